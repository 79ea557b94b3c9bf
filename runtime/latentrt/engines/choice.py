"""Which engines does this machine run, and why not the others?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from latentrt.bundle.bundle import Bundle
from latentrt.engines.gpu import Gpu
from latentrt.engines.record import EngineIdentity, EngineRecord, LibraryName, this_platform
from latentrt.engines.sealed import sealed_engines
from latentrt.engines.store import EngineStore, StoredEngine
from latentrt.errors import EngineError

__all__ = ["EngineSource", "Machine", "Misfit", "engines_for", "misfits"]


class EngineSource(Protocol):
    """An engine that is there, in the cache or in a bundle."""

    @property
    def record(self) -> EngineRecord:
        """What it is."""

    def plan(self) -> bytes:
        """The plan, the very bytes that were hashed.

        Raises:
            EngineDamagedError, IntegrityError: it is not the one that is pinned.
        """


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What engines run on: the GPU, and the version of each library that is installed."""

    gpu: Gpu
    versions: Mapping[LibraryName, str]


@dataclass(frozen=True)
class Misfit:
    """An engine of the bundle that this machine does not run, and why."""

    record: EngineRecord
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Cached:
    store: EngineStore
    engine: StoredEngine

    @property
    def record(self) -> EngineRecord:
        return self.engine.record

    def plan(self) -> bytes:
        data = self.store.plan(self.engine)
        self.store.mark_used(self.engine)
        return data


def engines_for(bundle: Bundle, component: str, machine: Machine) -> tuple[list[EngineSource], list[Misfit]]:
    """The engines of a submodule that run here, and those that do not.

    Those that the bundle brings along stand first, then the one for the fewest shapes: it was made for just that.
    """
    fit: list[EngineSource] = []
    others: list[Misfit] = []
    for source in _sources(bundle):
        record = source.record
        if record.identity.component == component:
            reasons = tuple(misfits(record.identity, bundle, machine))
            if reasons:
                others.append(Misfit(record, reasons))
            else:
                fit.append(source)
    fit.sort(key=lambda source: (isinstance(source, _Cached), _breadth(source.record.identity)))
    return fit, others


def _sources(bundle: Bundle) -> Iterator[EngineSource]:
    yield from sealed_engines(bundle)
    try:
        store = EngineStore()
    except EngineError:
        return  # a user without a cache has what is sealed
    yield from (_Cached(store, engine) for engine in store.engines())


def _breadth(identity: EngineIdentity) -> float:
    """How many times larger the largest shapes of a profile are than the smallest."""
    breadth = 1.0
    for shapes in identity.profile.values():
        for low, high in zip(shapes.min, shapes.max, strict=True):
            breadth *= high / low
    return breadth


def misfits(identity: EngineIdentity, bundle: Bundle, machine: Machine) -> Iterator[str]:
    """Why an engine does not run here, or not for this bundle, a clause each."""
    component, files = bundle.manifest.components.get(identity.component), bundle.manifest.files
    graph = None if component is None else component.graphs.get(identity.precision)
    if component is None or graph is None or files[graph.file].sha256 != identity.graph:
        yield f"graph changed: {identity.component}"
    elif identity.weights not in (None, files[component.weights.file].sha256):
        yield f"weights changed: {identity.component}"
    yield from _library_misfits(identity, machine)
    if identity.platform != this_platform():
        yield f"built for {identity.platform}, this is {this_platform()}"
    yield from _gpu_misfits(identity, machine.gpu)


def _library_misfits(identity: EngineIdentity, machine: Machine) -> Iterator[str]:
    version = machine.versions.get(identity.library)
    if version is None:
        yield f"built by {identity.library}, which is not installed"
    elif version != identity.library_version and not (
        identity.options.version_compatible and _is_later(version, identity.library_version)
    ):
        yield f"built by {identity.library} {identity.library_version}, this is {version}"


def _is_later(version: str, other: str) -> bool:
    """A later release of the same major version."""
    here, there = ([int(part) for part in text.split("+")[0].split(".") if part.isdigit()] for text in (version, other))
    return here[:1] == there[:1] and here >= there


def _gpu_misfits(identity: EngineIdentity, gpu: Gpu) -> Iterator[str]:
    capabilities = identity.compute_capabilities
    if identity.library == "tensorrt" and identity.options.hardware_compatibility == "ampere_plus":
        if float(gpu.compute_capability) < 8:
            yield f"built for compute capability 8.0 and later, this GPU is {gpu.compute_capability}"
    elif gpu.compute_capability not in capabilities:
        yield f"built for {', '.join(capabilities)}, this GPU is {gpu.compute_capability}"
    elif identity.gpu not in (None, gpu.name):
        yield f"built for {identity.gpu}, this GPU is {gpu.name}"

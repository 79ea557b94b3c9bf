"""The choice of a component's engines: those that run on this machine, and why the others do not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from latentrt.bundle.bundle import Bundle
from latentrt.engines.record import EngineIdentity, EngineRecord, LibraryName, this_platform
from latentrt.engines.sealed import read_sealed_engines
from latentrt.engines.store import EngineStore, StoredEngine
from latentrt.errors import EngineError

__all__ = ["EngineSource", "Incompatible", "Machine", "choose_engines", "find_incompatibilities"]

# A number of a version; of other digits than ASCII, or of thousands, Python makes no number.
_NUMBER = re.compile(r"(?<![^.])[0-9]{1,9}(?![^.])")


class EngineSource(Protocol):
    """An engine that can be loaded, from the user's store or from a bundle."""

    @property
    def record(self) -> EngineRecord:
        """The engine's record."""

    def plan(self) -> bytes:
        """Read the plan; return exactly the bytes that were hashed.

        Raises:
            EngineDamagedError, IntegrityError: the plan differs from its pinned SHA-256.
        """


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The GPU of a machine, and its installed libraries.

    Attributes:
        gpu: the driver's name of the GPU.
        compute_capability: as in `8.9`.
        versions: version of each installed library.
    """

    gpu: str
    compute_capability: str
    versions: Mapping[LibraryName, str]


@dataclass(frozen=True)
class Incompatible:
    """An engine that this machine cannot run for a bundle, with a clause for each reason."""

    record: EngineRecord
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _StoredSource:
    """An engine in the user's store."""

    store: EngineStore
    engine: StoredEngine

    @property
    def record(self) -> EngineRecord:
        return self.engine.record

    def plan(self) -> bytes:
        data = self.store.plan(self.engine)
        self.store.mark_used(self.engine)
        return data


def choose_engines(bundle: Bundle, component: str, machine: Machine) -> tuple[list[EngineSource], list[Incompatible]]:
    """Sort a component's engines into those that run on this machine and those that do not.

    Returns:
        The compatible engines, the best first: engines of the bundle before those of the user's store, and narrow
        profiles before wide ones, as a narrow profile is tuned for fewer shapes. And the incompatible engines.
    """
    compatible: list[EngineSource] = []
    incompatible: list[Incompatible] = []
    groups: tuple[Sequence[EngineSource], ...] = (read_sealed_engines(bundle), _list_stored())
    for group in groups:
        of_group: list[EngineSource] = []
        for source in group:
            if source.record.identity.component != component:
                continue
            if reasons := tuple(find_incompatibilities(source.record.identity, bundle, machine)):
                incompatible.append(Incompatible(source.record, reasons))
            else:
                of_group.append(source)
        compatible += sorted(of_group, key=lambda each: _profile_breadth(each.record.identity))
    return compatible, incompatible


def _list_stored() -> list[_StoredSource]:
    try:
        store = EngineStore()
    except EngineError:
        return []  # without a cache folder only sealed engines are available
    return [_StoredSource(store, engine) for engine in store.engines()]


def _profile_breadth(identity: EngineIdentity) -> float:
    """Return the ratio of the largest to the smallest shapes of a profile, multiplied over all axes."""
    breadth = 1.0
    for shapes in identity.profile.values():
        for low, high in zip(shapes.min, shapes.max, strict=True):
            breadth *= high / low
    return breadth


def find_incompatibilities(identity: EngineIdentity, bundle: Bundle, machine: Machine) -> Iterator[str]:
    """Yield each reason why an engine does not run on a machine or does not belong to a bundle, as a clause."""
    component, files = bundle.manifest.components.get(identity.component), bundle.manifest.files
    graph = None if component is None else component.graphs.get(identity.precision)
    if component is None or graph is None or files[graph.file].sha256 != identity.graph:
        yield f"graph changed: {identity.component}"
    elif identity.weights not in (None, files[component.weights.file].sha256):
        yield f"weights changed: {identity.component}"
    yield from _library_incompatibilities(identity, machine)
    if identity.platform != this_platform():
        yield f"built for {identity.platform}, this is {this_platform()}"
    yield from _gpu_incompatibilities(identity, machine)


def _library_incompatibilities(identity: EngineIdentity, machine: Machine) -> Iterator[str]:
    version = machine.versions.get(identity.library)
    if version is None:
        yield f"built by {identity.library}, which is not installed"
    elif version != identity.library_version and not (
        identity.options.version_compatible and _is_later(version, identity.library_version)
    ):
        yield f"built by {identity.library} {identity.library_version}, this is {version}"


def _is_later(version: str, other: str) -> bool:
    """Return whether a version is a later release of the same major version as another, or the same one."""
    left, right = ([int(part) for part in _NUMBER.findall(text.split("+")[0])] for text in (version, other))
    return left[:1] == right[:1] and left >= right


def _gpu_incompatibilities(identity: EngineIdentity, machine: Machine) -> Iterator[str]:
    capabilities = identity.compute_capabilities
    if identity.library == "tensorrt" and identity.options.hardware_compatibility == "ampere_plus":
        if float(machine.compute_capability) < 8:
            yield f"built for compute capability 8.0 and later, this GPU is {machine.compute_capability}"
    elif machine.compute_capability not in capabilities:
        yield f"built for {', '.join(capabilities)}, this GPU is {machine.compute_capability}"
    elif identity.gpu not in (None, machine.gpu):
        yield f"built for {identity.gpu}, this GPU is {machine.gpu}"

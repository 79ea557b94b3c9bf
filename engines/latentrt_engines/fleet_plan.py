"""Which engines does a fleet want, which are there, and which can be built on this machine?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec

from latentrt.backends.tensorrt.library import TITLES
from latentrt.bundle.bundle import Bundle
from latentrt.engines.gpu import Gpu, NoGpu
from latentrt.engines.record import EngineIdentity, EngineRecord, serves, this_platform
from latentrt.engines.sealed import sealed_engines
from latentrt.engines.store import EngineStore
from latentrt.errors import BackendError, RequestError
from latentrt_engines.ask import Ask
from latentrt_engines.fleet import UNNAMED, FleetGpu, by_driver_name
from latentrt_engines.library import Library, load_library
from latentrt_engines.wanted import Wanted

__all__ = ["PlannedEngine", "plan_fleet"]

# What a plan holds besides its weights: seen 1 to 6 MB for small graphs, 20 MB for a full-size denoiser.
_KERNEL_BYTES = 5_000_000


@dataclass(frozen=True, kw_only=True)
class PlannedEngine:
    """One engine for one GPU of the fleet.

    Attributes:
        there: `cache`, `bundle` (sealed into it), or None.
        key: of the engine that is there, which may be for more GPUs; of the one to be built if none is.
        size_bytes: of the plan; an estimate where it is not there.
        obstacle: why this machine cannot build it; None if it can.
        elsewhere: whether the GPU's own machine can.
    """

    gpu: FleetGpu
    wanted: Wanted
    there: str | None
    key: str
    size_bytes: int
    obstacle: str | None
    elsewhere: bool


def plan_fleet(
    bundle: Bundle, ask: Ask, fleet: Iterable[FleetGpu], store: EngineStore, here: Gpu | NoGpu
) -> list[PlannedEngine]:
    """Each engine that each GPU wants.

    Raises:
        RequestError: the bundle cannot draw what is asked for, or no GPU can be served like that.
    """
    cached = [engine.record for engine in store.engines() if engine.seems_whole]
    sealed = [engine.record for engine in sealed_engines(bundle)]
    planned = []
    for gpu in fleet:
        library, obstacle = _builder(gpu, ask, here)
        target = here if _is(here, gpu) else _as_gpu(gpu)
        for wanted in ask.engines(bundle, ask.profiles(bundle), library, (gpu.compute_capability,), target):
            found, there = _find(wanted, gpu, library, sealed, cached)
            planned.append(
                PlannedEngine(
                    gpu=gpu,
                    wanted=wanted,
                    there=there,
                    key=found.key if found else wanted.key,
                    size_bytes=found.plan.size if found else _estimate(wanted, bundle),
                    obstacle=obstacle,
                    elsewhere=obstacle is not None and library.needs_gpu and not _is(here, gpu),
                )
            )
    return planned


def _builder(gpu: FleetGpu, ask: Ask, here: Gpu | NoGpu) -> tuple[Library, str | None]:
    """The library that builds for a GPU, and why it cannot do that here."""
    name = ask.library or gpu.library
    # Where it is not installed, what is there can be told all the same: of any version.
    library, obstacle = Library(name=name, module=None, version=""), None
    try:
        library = load_library(name)
        library.check(ask.options(), (gpu.compute_capability,), here)
    except (RequestError, BackendError) as error:
        obstacle = str(error)
    if library.needs_gpu and not _is(here, gpu):
        obstacle = f"{TITLES[name]} builds on the GPU itself: run latentrt build there"
    return library, obstacle


def _is(here: Gpu | NoGpu, gpu: FleetGpu) -> bool:
    """Whether the GPU of this machine is one of these."""
    if not isinstance(here, Gpu):
        return False
    if gpu.driver_name == UNNAMED:
        return here.compute_capability == gpu.compute_capability
    return by_driver_name(here.name) == gpu


def _as_gpu(gpu: FleetGpu) -> Gpu:
    return Gpu(name=gpu.driver_name, compute_capability=gpu.compute_capability, memory_bytes=0, cuda="")


def _find(
    wanted: Wanted, gpu: FleetGpu, library: Library, sealed: Sequence[EngineRecord], cached: Sequence[EngineRecord]
) -> tuple[EngineRecord | None, str | None]:
    for place, records in (("bundle", sealed), ("cache", cached)):
        for record in records:
            runs = _runs_on(record.identity, gpu, wanted, library)
            if runs and serves(_aimed(record.identity, wanted), wanted.identity):
                return record, place
    return None, None


def _runs_on(identity: EngineIdentity, gpu: FleetGpu, wanted: Wanted, library: Library) -> bool:
    if identity.library != library.name or identity.library_version != (library.version or identity.library_version):
        return False
    if identity.platform != this_platform():
        return False
    if gpu.compute_capability not in identity.compute_capabilities:
        return False
    # Of this machine's GPU the whole name is known; of another, what it begins with.
    if wanted.identity.gpu not in (None, gpu.driver_name):
        return identity.gpu == wanted.identity.gpu
    return identity.gpu is None or identity.gpu == gpu.driver_name or by_driver_name(identity.gpu) == gpu


def _aimed(found: EngineIdentity, wanted: Wanted) -> EngineIdentity:
    """The engine with what `_runs_on` has looked at as it is wanted."""
    identity = wanted.identity
    return msgspec.structs.replace(
        found, library_version=identity.library_version, platform=identity.platform, gpu=identity.gpu
    )


def _estimate(wanted: Wanted, bundle: Bundle) -> int:
    _, weights = bundle.component_files(wanted.component, wanted.identity.precision)
    return _KERNEL_BYTES + (0 if wanted.identity.weights is None else bundle.manifest.files[weights].size)

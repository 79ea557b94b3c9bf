"""The plan of a fleet of GPUs: the engines that they need, those that exist, and those that this machine can build."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from latentrt.backends.tensorrt.library import TITLES
from latentrt.bundle.bundle import Bundle
from latentrt.engines.gpu import Gpu, NoGpu
from latentrt.engines.record import EngineIdentity, EngineRecord, serves, this_platform
from latentrt.engines.sealed import read_sealed_engines
from latentrt.engines.store import EngineStore
from latentrt.errors import BackendError, RequestError
from latentrt_engines.gpus import UNNAMED, GpuModel, find_by_driver_name
from latentrt_engines.library import Library, load_library
from latentrt_engines.options import BuildOptions
from latentrt_engines.targets import EngineTarget

__all__ = ["Location", "PlannedEngine", "plan_fleet"]

Location = Literal["bundle", "cache"]

# Size of a plan without its weights, in bytes: measured 1 to 6 MB for small graphs, 20 MB for a full-size denoiser.
_KERNEL_BYTES = 5_000_000


@dataclass(frozen=True, kw_only=True)
class PlannedEngine:
    """An engine for one GPU model of a fleet.

    Attributes:
        location: the place of the existing engine; None if it has to be built.
        key: the key of the existing engine, which may support more GPUs, or of the engine to build.
        size_bytes: the size of the plan; an estimate if it has to be built.
        obstacle: the reason why this machine cannot build it; None if it can.
        buildable_elsewhere: whether a machine with the GPU can build it, while this machine cannot.
    """

    gpu: GpuModel
    target: EngineTarget
    location: Location | None
    key: str
    size_bytes: int
    obstacle: str | None
    buildable_elsewhere: bool


def plan_fleet(
    bundle: Bundle, options: BuildOptions, fleet: Iterable[GpuModel], store: EngineStore, here: Gpu | NoGpu
) -> list[PlannedEngine]:
    """List the engines that each GPU model of a fleet needs.

    Args:
        here: the GPU of this machine.

    Raises:
        RequestError: an option is invalid, or the bundle cannot generate such images.
    """
    stored = [engine.record for engine in store.engines() if engine.is_complete]
    sealed = read_sealed_engines(bundle)
    existing: dict[Location, Sequence[EngineRecord]] = {"bundle": [one.record for one in sealed], "cache": stored}
    profiles = options.parse_profiles(bundle)
    planned = []
    for gpu in fleet:
        library, obstacle = _find_builder(gpu, options, here)
        is_here = _is_model(here, gpu)
        device = here if is_here else _as_gpu(gpu)
        for target in options.list_targets(bundle, profiles, library, (gpu.compute_capability,), device):
            found, location = _find_engine(target, gpu, library, existing)
            planned.append(
                PlannedEngine(
                    gpu=gpu,
                    target=target,
                    location=location,
                    key=found.key if found else target.key,
                    size_bytes=found.plan.size if found else _estimate_size(target, bundle),
                    obstacle=obstacle,
                    buildable_elsewhere=obstacle is not None and library.needs_gpu and not is_here,
                )
            )
    return planned


def _find_builder(gpu: GpuModel, options: BuildOptions, here: Gpu | NoGpu) -> tuple[Library, str | None]:
    """Return the library that builds for a GPU model, and the reason why it cannot build on this machine, or None."""
    name = options.library or gpu.library
    # Without the library, existing engines of any version are found.
    library, obstacle = Library(name=name, module=None, version=""), None
    try:
        library = load_library(name)
        library.check(options.parse_engine_options(), (gpu.compute_capability,), here)
    except (RequestError, BackendError) as error:
        obstacle = str(error)
    if library.needs_gpu and not _is_model(here, gpu):
        obstacle = f"{TITLES[name]} builds on the GPU itself: run latentrt build there"
    return library, obstacle


def _is_model(here: Gpu | NoGpu, gpu: GpuModel) -> bool:
    """Return whether the GPU of this machine is of a model."""
    if not isinstance(here, Gpu):
        return False
    if gpu.driver_name == UNNAMED:
        return here.compute_capability == gpu.compute_capability
    return find_by_driver_name(here.name) == gpu


def _as_gpu(gpu: GpuModel) -> Gpu:
    return Gpu(name=gpu.driver_name, compute_capability=gpu.compute_capability, memory_bytes=0, cuda="")


def _find_engine(
    target: EngineTarget, gpu: GpuModel, library: Library, existing: dict[Location, Sequence[EngineRecord]]
) -> tuple[EngineRecord | None, Location | None]:
    for location, records in existing.items():
        for record in records:
            runs = _runs_on(record.identity, gpu, target, library)
            if runs and serves(_with_platform_of(record.identity, target), target.identity):
                return record, location
    return None, None


def _runs_on(identity: EngineIdentity, gpu: GpuModel, target: EngineTarget, library: Library) -> bool:
    if identity.library != library.name or identity.library_version != (library.version or identity.library_version):
        return False
    if identity.platform != this_platform():
        return False
    if gpu.compute_capability not in identity.compute_capabilities:
        return False
    # The full driver's name is known for this machine's GPU only; for a model, only its beginning.
    if target.identity.gpu not in (None, gpu.driver_name):
        return identity.gpu == target.identity.gpu
    return identity.gpu is None or identity.gpu == gpu.driver_name or find_by_driver_name(identity.gpu) == gpu


def _with_platform_of(found: EngineIdentity, target: EngineTarget) -> EngineIdentity:
    """Replace the fields that `_runs_on` has compared by the target's."""
    identity = target.identity
    return msgspec.structs.replace(
        found, library_version=identity.library_version, platform=identity.platform, gpu=identity.gpu
    )


def _estimate_size(target: EngineTarget, bundle: Bundle) -> int:
    _, weights = bundle.component_files(target.component, target.identity.precision)
    return _KERNEL_BYTES + (0 if target.identity.weights is None else bundle.manifest.files[weights].size)

"""Builds of real plans from real bundles, on any machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Precision
from latentrt.engines.gpu import Gpu, find_gpu
from latentrt.engines.record import EngineOptions, LibraryName
from latentrt.engines.store import StoredEngine
from latentrt_engines.build import Progress, build_engines
from latentrt_engines.cache import EngineCache
from latentrt_engines.library import Library, load_libraries, load_library
from latentrt_engines.profiles import image_profile
from latentrt_engines.targets import EngineTarget, list_targets

# Small images, so that a build takes a second.
SIZES = {"static": "64x64", "ranged": "64x64:64x64:128x96"}
TARGET = "8.9"


class RecordedProgress(Progress):
    """A progress that records its calls."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, str, float]] = []
        self.finished: list[tuple[str, bool]] = []
        self.warnings: list[str] = []

    def update(self, component: str, text: str, fraction: float) -> None:
        self.phases.append((component, text, fraction))

    def finish(self, component: str, engine: StoredEngine, *, built: bool) -> None:
        self.finished.append((component, built))

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def list_usable_libraries() -> list[LibraryName]:
    """List TensorRT-RTX, which builds on any machine, and TensorRT if it is installed and there is a GPU."""
    usable: list[LibraryName] = ["tensorrt_rtx"]
    if isinstance(load_libraries()["tensorrt"], Library) and isinstance(find_gpu(), Gpu):
        usable.append("tensorrt")
    return usable


def make_targets(
    bundle: Bundle,
    *components: str,
    size: str = SIZES["static"],
    batch: str = "1",
    precision: Precision | None = None,
    library: LibraryName = "tensorrt_rtx",
    options: EngineOptions | None = None,
) -> list[EngineTarget]:
    """List engines of a bundle for compute capability 8.9; with TensorRT for the GPU of this machine."""
    gpu, loaded = find_gpu(), load_library(library)
    capabilities = (gpu.compute_capability,) if loaded.needs_gpu and isinstance(gpu, Gpu) else (TARGET,)
    return list_targets(
        bundle,
        components or tuple(bundle.manifest.components),
        image_profile(bundle.manifest, size=size, batch=batch),
        library=loaded,
        options=options or EngineOptions(),
        capabilities=capabilities,
        gpu=gpu,
        precision=precision,
    )


def build(
    bundle: Bundle, targets: list[EngineTarget], cache: EngineCache, progress: RecordedProgress | None = None
) -> list[StoredEngine]:
    """Build the engines, or find them in the cache."""
    return list(build_engines(bundle, targets, cache, progress or RecordedProgress()))


def start_build(bundle: Path, cache: Path, *more: str, **popen: object) -> subprocess.Popen[str]:
    """Start `latentrt build` for one GPU in a process of its own, as a user does."""
    command = [sys.executable, "-m", "latentrt", "build", str(bundle), "--gpu", "rtx4090", *more]
    environment = {**os.environ, "LATENTRT_CACHE": str(cache)}
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )

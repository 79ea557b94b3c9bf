"""Real plans of real bundles, on a machine without a GPU."""

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
from latentrt_engines.build import build_engines
from latentrt_engines.cache import EngineCache
from latentrt_engines.library import Library, installed_libraries, load_library
from latentrt_engines.profiles import picture_profile
from latentrt_engines.wanted import Wanted, wanted_engines

# Small pictures, so that a build takes a second.
SIZES = {"static": "64x64", "ranged": "64x64:64x64:128x96"}
TARGET = "8.9"


class Told:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, str, float]] = []
        self.finished: list[tuple[str, bool]] = []
        self.warnings: list[str] = []

    def phase(self, component: str, text: str, fraction: float) -> None:
        self.phases.append((component, text, fraction))

    def done(self, component: str, engine: StoredEngine, *, built: bool) -> None:
        self.finished.append((component, built))

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def usable_libraries() -> list[LibraryName]:
    """TensorRT-RTX, which builds anywhere, and TensorRT where it is installed and has its GPU."""
    there: list[LibraryName] = ["tensorrt_rtx"]
    if isinstance(installed_libraries()["tensorrt"], Library) and isinstance(find_gpu(), Gpu):
        there.append("tensorrt")
    return there


def wanted(
    bundle: Bundle,
    *components: str,
    size: str = SIZES["static"],
    batch: str = "1",
    precision: Precision | None = None,
    library: LibraryName = "tensorrt_rtx",
    options: EngineOptions | None = None,
) -> list[Wanted]:
    """Engines of a bundle, for a GPU that need not be there."""
    gpu, loaded = find_gpu(), load_library(library)
    targets = (gpu.compute_capability,) if loaded.needs_gpu and isinstance(gpu, Gpu) else (TARGET,)
    return wanted_engines(
        bundle,
        components or tuple(bundle.manifest.components),
        picture_profile(bundle.manifest, size=size, batch=batch),
        library=loaded,
        options=options or EngineOptions(),
        capabilities=targets,
        gpu=gpu,
        precision=precision,
    )


def built(bundle: Bundle, engines: list[Wanted], cache: EngineCache, told: Told | None = None) -> list[StoredEngine]:
    """Build them, or find them."""
    return list(build_engines(bundle, engines, cache, told or Told()))


def build_command(bundle: Path, cache: Path, *more: str, **popen: object) -> subprocess.Popen[str]:
    """`latentrt build` of one engine in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "latentrt", "build", str(bundle), "--gpu", "rtx4090", *more]
    environment = {**os.environ, "LATENTRT_CACHE": str(cache)}
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )

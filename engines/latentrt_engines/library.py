"""TensorRT and TensorRT-RTX behind one interface, with the limits of each.

Both have the same API under two import names. `tensorrt` builds on the GPU that runs the plan, `tensorrt_rtx` on any
machine for a set of compute capabilities. Unsupported options are rejected before a build starts, because the library
would report an internal error after minutes of work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.backends.tensorrt.library import EXTRAS, TITLES, LoadedLibrary, import_library
from latentrt.engines.gpu import Gpu, NoGpu
from latentrt.engines.record import EngineOptions, LibraryName
from latentrt.errors import BackendError, RequestError

__all__ = ["Library", "load_libraries", "load_library"]


@dataclass(frozen=True, kw_only=True)
class Library(LoadedLibrary):
    """An imported library, and the builds that it supports."""

    @property
    def needs_gpu(self) -> bool:
        """Whether the library builds only on the GPU that runs the plan."""
        return self.name == "tensorrt"

    def capabilities(self) -> dict[str, Any]:
        """Return the compute capabilities that a build can target: `8.9` → the library's own constant."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        return {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}

    def check(self, options: EngineOptions, capabilities: tuple[str, ...], gpu: Gpu | NoGpu) -> None:
        """Reject a build that the library does not support on this machine.

        Args:
            options: the builder options.
            capabilities: the compute capabilities that the plan has to support.
            gpu: the GPU of this machine.

        Raises:
            BackendError: the library needs a GPU, and this machine has none that can be used.
            RequestError: the options exclude each other, or the library does not support one of them here.
        """
        for problem in _find_contradictions(options):
            raise RequestError(problem)
        problems = self._find_tensorrt_problems if self.needs_gpu else self._find_rtx_problems
        for problem in problems(options, capabilities, gpu):
            raise RequestError(problem)

    def check_timing_cache(self, path: Path | None) -> None:
        """Reject a timing cache if the library does not use one.

        Raises:
            RequestError: the library is TensorRT-RTX, which chooses kernels on the machine that runs them.
        """
        if path is not None and not self.needs_gpu:
            raise RequestError(
                f"{self} uses no timing cache, because its kernels are chosen on the machine that runs them; omit "
                "--timing-cache"
            )

    def _find_tensorrt_problems(
        self, options: EngineOptions, capabilities: tuple[str, ...], gpu: Gpu | NoGpu
    ) -> Iterator[str]:
        if isinstance(gpu, NoGpu):
            raise BackendError(
                f"{self} builds on the GPU that the plan is for, and on this machine {gpu.reason}; {gpu.mend}, or "
                "build for an RTX GPU with --library tensorrt_rtx"
            )
        if capabilities != (gpu.compute_capability,):
            yield (
                f"{self} builds for the GPU of this machine, {gpu}, got a build for {', '.join(capabilities)}; run "
                "this command on that machine, or build for an RTX GPU with --library tensorrt_rtx"
            )

    def _find_rtx_problems(
        self, options: EngineOptions, capabilities: tuple[str, ...], gpu: Gpu | NoGpu
    ) -> Iterator[str]:
        known = self.capabilities()
        for capability in capabilities:
            if capability not in known:
                yield (
                    f"{self} cannot build for compute capability {capability}, expected one of {', '.join(known)}; use "
                    "--library tensorrt on the machine that has that GPU"
                )
        if options.hardware_compatibility != "none":
            yield (
                f"{self} does not support --hardware-compatibility {options.hardware_compatibility}; list every "
                "GPU that the plan is for instead, as in --compute-capabilities 8.6,8.9,12.0"
            )
        if options.version_compatible:
            yield (
                f"{self} does not build version-compatible plans: each plan belongs to one release; omit "
                "--version-compatible, and build again after an upgrade"
            )
        if isinstance(gpu, NoGpu):
            yield from self._find_rtx_problems_without_gpu(options, gpu)

    def _find_rtx_problems_without_gpu(self, options: EngineOptions, gpu: NoGpu) -> Iterator[str]:
        for selected, option, plans in (
            (options.strip_weights, "--strip-weights", "plans without weights"),
            (options.refittable, "--refittable", "refittable plans"),
        ):
            if selected:
                yield (
                    f"{self} builds {plans} only on a machine with a GPU, and on this machine {gpu.reason}; omit "
                    f"{option}, or build on a machine with a GPU"
                )


def load_library(name: LibraryName) -> Library:
    """Import a library.

    Raises:
        MissingExtraError: the library is not installed.
        BackendError: the library is installed but cannot be loaded.
    """
    loaded = import_library(name, f"build engines with {TITLES[name]}")
    return Library(name=name, module=loaded.module, version=loaded.version)


def load_libraries() -> dict[LibraryName, Library | str]:
    """Import both libraries; in place of one that cannot be loaded, return the error."""
    found: dict[LibraryName, Library | str] = {}
    for name in EXTRAS:
        try:
            found[name] = load_library(name)
        except BackendError as error:
            found[name] = str(error)
    return found


def _find_contradictions(options: EngineOptions) -> Iterator[str]:
    if not 0 <= options.optimization_level <= 5:
        yield f"got --builder-optimization-level {options.optimization_level}, expected 0 to 5"
    for selected, name in ((options.refittable, "--refittable"), (options.strip_weights, "--strip-weights")):
        if options.version_compatible and selected:
            yield (
                f"got --version-compatible with {name}, expected one of them: a version-compatible plan that does not "
                "contain the lean runtime cannot be refitted; omit one of them"
            )

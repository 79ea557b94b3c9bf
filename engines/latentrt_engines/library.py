"""TensorRT and TensorRT-RTX behind one face: which is here, and what can it not do?

The two have one API under two import names. What differs is where they build: `tensorrt` on the GPU that the plan is
for, `tensorrt_rtx` anywhere, for a set of compute capabilities. What a library cannot do is refused before a build
starts, as its own answer would be an internal error after the work.
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

__all__ = ["Library", "installed_libraries", "load_library"]


@dataclass(frozen=True, kw_only=True)
class Library(LoadedLibrary):
    """One of the two, and what it can build."""

    @property
    def needs_gpu(self) -> bool:
        """Whether it builds only on the GPU that the plan is for."""
        return self.name == "tensorrt"

    def capabilities(self) -> dict[str, Any]:
        """The compute capabilities that a build can name: `8.9` → the library's own constant."""
        members = getattr(getattr(self.module, "ComputeCapability", None), "__members__", {})
        return {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}

    def check(self, options: EngineOptions, capabilities: tuple[str, ...], gpu: Gpu | NoGpu) -> None:
        """Refuse what cannot be built.

        Args:
            capabilities: the compute capabilities that the plan is for.
            gpu: of this machine.

        Raises:
            BackendError: it needs a GPU, and there is none that can be used.
            RequestError: the options exclude each other, or this library cannot do one of them here.
        """
        for problem in _contradictions(options):
            raise RequestError(problem)
        problems = self._tensorrt_problems if self.needs_gpu else self._rtx_problems
        for problem in problems(options, capabilities, gpu):
            raise RequestError(problem)

    def check_timing_cache(self, path: Path | None) -> None:
        """Refuse a timing cache that would not be used.

        Raises:
            RequestError: TensorRT-RTX has none, as it times kernels on the machine that runs them.
        """
        if path is not None and not self.needs_gpu:
            raise RequestError(
                f"{self} uses no timing cache: its kernels are chosen on the machine that runs them; leave out "
                "--timing-cache"
            )

    def _tensorrt_problems(
        self, options: EngineOptions, capabilities: tuple[str, ...], gpu: Gpu | NoGpu
    ) -> Iterator[str]:
        if isinstance(gpu, NoGpu):
            raise BackendError(
                f"{self} builds on the GPU that the plan is for, and here {gpu.reason}; {gpu.mend}, or build for an "
                "RTX GPU with --library tensorrt_rtx"
            )
        if capabilities != (gpu.compute_capability,):
            yield (
                f"{self} builds for the GPU of this machine, {gpu}, found a build for {', '.join(capabilities)}; run "
                "this command on that machine, or build for an RTX GPU with --library tensorrt_rtx"
            )

    def _rtx_problems(self, options: EngineOptions, capabilities: tuple[str, ...], gpu: Gpu | NoGpu) -> Iterator[str]:
        known = self.capabilities()
        for capability in capabilities:
            if capability not in known:
                yield (
                    f"{self} cannot build for compute capability {capability}, it knows {', '.join(known)}; use "
                    "--library tensorrt on the machine that has that GPU"
                )
        if options.hardware_compatibility != "none":
            yield (
                f"{self} has no levels of hardware compatibility: name every GPU that the plan is for instead, as in "
                "--compute-capabilities 8.6,8.9,12.0"
            )
        if options.version_compatible:
            yield (
                f"{self} makes no version-compatible plans: each belongs to one release; leave out "
                "--version-compatible, and build again after an upgrade"
            )
        if isinstance(gpu, NoGpu):
            yield from self._rtx_problems_without_gpu(options, gpu)

    def _rtx_problems_without_gpu(self, options: EngineOptions, gpu: NoGpu) -> Iterator[str]:
        for wanted, option, words in (
            (options.strip_weights, "--strip-weights", "plans without their weights"),
            (options.refittable, "--refittable", "refittable plans"),
        ):
            if wanted:
                yield (
                    f"{self} makes {words} only on a machine with a GPU, and here {gpu.reason}; leave out {option}, "
                    "or build there"
                )


def load_library(name: LibraryName) -> Library:
    """Import one of the two.

    Raises:
        MissingExtraError: it is not installed. BackendError: it is, and cannot be loaded.
    """
    loaded = import_library(name, f"build engines with {TITLES[name]}")
    return Library(name=name, module=loaded.module, version=loaded.version)


def installed_libraries() -> dict[LibraryName, Library | str]:
    """Each library, or why it cannot be used."""
    found: dict[LibraryName, Library | str] = {}
    for name in EXTRAS:
        try:
            found[name] = load_library(name)
        except BackendError as error:
            found[name] = str(error)
    return found


def _contradictions(options: EngineOptions) -> Iterator[str]:
    if not 0 <= options.optimization_level <= 5:
        yield f"found optimization level {options.optimization_level}, expected 0 to 5"
    for other, name in ((options.refittable, "--refittable"), (options.strip_weights, "--strip-weights")):
        if options.version_compatible and other:
            yield (
                f"--version-compatible and {name} exclude each other: a plan that runs without its lean runtime inside "
                "cannot be refitted; choose one"
            )

"""Imports TensorRT and TensorRT-RTX where installed, and returns their versions.

The two libraries have one API under two import names; this is the only module that imports them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latentrt.engines.record import LibraryName
from latentrt.errors import BackendError, MissingExtraError

__all__ = ["EXTRAS", "TITLES", "LoadedLibrary", "find_libraries", "import_library", "make_logger"]

EXTRAS: dict[LibraryName, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "rtx"}
TITLES: dict[LibraryName, str] = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


@dataclass(frozen=True, kw_only=True)
class LoadedLibrary:
    """An imported library.

    Attributes:
        module: `tensorrt` or `tensorrt_rtx`.
        version: with the CUDA major version of its wheel, as in `1.7.1.116+cu13`.
    """

    name: LibraryName
    module: Any
    version: str

    def __str__(self) -> str:
        return f"{TITLES[self.name]} {self.version}"


def import_library(name: LibraryName, purpose: str) -> LoadedLibrary:
    """Import a library.

    Args:
        purpose: the end of the sentence "… is needed to …" in the error.

    Raises:
        MissingExtraError: it is not installed. BackendError: it is installed but cannot be loaded.
    """
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise MissingExtraError(name, EXTRAS[name], purpose) from error
        # Its shared libraries are missing, or are for another CUDA.
        raise BackendError(f"{name} is installed and cannot be loaded: {error}; install it again") from error
    return LoadedLibrary(name=name, module=module, version=f"{module.__version__}{_cuda_suffix(name)}")


def make_logger(library: LoadedLibrary, on_error: Callable[[str], None], on_warning: Callable[[str], None]) -> Any:
    """Return a logger of the library's class that forwards errors and warnings."""
    trt = library.module
    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]  # the library's classes have no types
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                on_error(message)
            elif severity == trt.ILogger.WARNING:
                on_warning(message)

    return Logger()


def find_libraries(purpose: str = "run engines") -> dict[LibraryName, LoadedLibrary | str]:
    """Return each library, or the reason it cannot be used."""
    found: dict[LibraryName, LoadedLibrary | str] = {}
    for name in EXTRAS:
        try:
            found[name] = import_library(name, purpose)
        except BackendError as error:
            found[name] = str(error)
    return found


def _cuda_suffix(name: LibraryName) -> str:
    """Return `+cu13` or so, the suffix of the wheel's name: plans and their kernels belong to one CUDA version."""
    import importlib.metadata  # here, as it imports an e-mail parser, which takes longer than everything else

    for major in range(20, 10, -1):
        try:
            importlib.metadata.version(f"{name}_cu{major}")
        except importlib.metadata.PackageNotFoundError:
            continue
        return f"+cu{major}"
    return ""

"""TensorRT or TensorRT-RTX: which is installed, in which version?

The two have one API under two import names; this is the one place that imports them.
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
    """One of the two, imported.

    Attributes:
        module: `tensorrt` or `tensorrt_rtx`.
        version: with the CUDA major version it was made for, as in `1.7.1.116+cu13`.
    """

    name: LibraryName
    module: Any
    version: str

    def __str__(self) -> str:
        return f"{TITLES[self.name]} {self.version}"


def import_library(name: LibraryName, purpose: str) -> LoadedLibrary:
    """Import one of the two.

    Args:
        purpose: what it is needed for, as the end of the sentence "… is needed to …".

    Raises:
        MissingExtraError: it is not installed. BackendError: it is, and cannot be loaded.
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
    """The library's own logger, which hands errors and warnings on."""
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
    """Each library, or why it cannot be used."""
    found: dict[LibraryName, LoadedLibrary | str] = {}
    for name in EXTRAS:
        try:
            found[name] = import_library(name, purpose)
        except BackendError as error:
            found[name] = str(error)
    return found


def _cuda_suffix(name: LibraryName) -> str:
    """`+cu13`, as the wheel for that CUDA is called: plans and their kernels belong to one."""
    import importlib.metadata  # which imports an e-mail parser, longer than all of the rest

    for major in range(20, 10, -1):
        try:
            importlib.metadata.version(f"{name}_cu{major}")
        except importlib.metadata.PackageNotFoundError:
            continue
        return f"+cu{major}"
    return ""

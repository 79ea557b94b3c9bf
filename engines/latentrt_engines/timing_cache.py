"""Times of kernels that were measured on this GPU before, so that a build need not measure them again (`tensorrt`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentrt.bundle.atomic_file import write_atomically
from latentrt.errors import BuildError

__all__ = ["use_timing_cache"]


def use_timing_cache(config: Any, path: Path, warn: Callable[[str], None]) -> Callable[[], None]:
    """Give a builder's configuration the times in a file.

    Args:
        config: the library's.
        path: of the file; it need not be there yet.
        warn: told where the file is of no use.

    Returns:
        What writes the file, with the times that were added and those that another build has added meanwhile.

    Raises:
        BuildError: the file cannot be read or written.
    """
    cache = config.create_timing_cache(_read(path))
    if cache is None or not config.set_timing_cache(cache, False):
        warn(f"{path} holds the times of another GPU or version, and is begun anew")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)

    def save() -> None:
        measured = config.get_timing_cache()
        if others := _read(path):
            # False where they are of another version: then ours take their place.
            measured.combine(config.create_timing_cache(others), False)
        try:
            write_atomically(path, bytes(memoryview(measured.serialize())))
        except OSError as error:
            raise BuildError(f"{path} cannot be written: {error.strerror}") from error

    return save


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror}") from error

"""Where does TensorRT-RTX keep the kernels that it compiles just in time?

In a file beside the engine, named for its own hash, so that what is handed to the library is what was written. It is an
optimisation: where it cannot be read or written, kernels are compiled again.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from latentrt.bundle.atomic_file import write_atomically
from latentrt.bundle.digests import hash_bytes, open_regular

__all__ = ["RuntimeCache"]

_SUFFIX = ".rtcache"
_LARGEST_BYTES = 1 << 30
_log = logging.getLogger("latentrt")


class RuntimeCache:
    """The compiled kernels of one engine.

    Args:
        folder: of the engine in the user's cache.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: Any = None
        self._saved = b""

    def attach(self, config: Any) -> None:
        """Give a runtime configuration what was compiled before, and a place for what will be."""
        self._cache = config.create_runtime_cache()
        self._saved = self._read()
        if self._saved and not self._cache.deserialize(self._saved):
            _log.info("%s: compiled kernels are of another driver or GPU, and are compiled again", self._folder)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write down what was compiled since."""
        if self._cache is None:
            return
        data = bytes(memoryview(self._cache.serialize()))
        if data and data != self._saved:
            with contextlib.suppress(OSError):
                self._folder.mkdir(mode=0o700, exist_ok=True)
                name = f"{hash_bytes(data)}{_SUFFIX}"
                write_atomically(self._folder / name, data, mode=0o600)
                for other in self._folder.glob(f"*{_SUFFIX}"):
                    if other.name != name:
                        other.unlink(missing_ok=True)
            self._saved = data

    def _read(self) -> bytes:
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            with contextlib.suppress(OSError), open_regular(path) as stream:
                data = stream.read(_LARGEST_BYTES)
                if f"{hash_bytes(data)}{_SUFFIX}" == path.name:
                    return data
                _log.warning("%s is not what was written, and is deleted", path)
                path.unlink(missing_ok=True)
        return b""

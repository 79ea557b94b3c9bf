"""The kernels that TensorRT-RTX compiles just in time, stored beside the engine.

The file is named for its own hash, so that the library reads only bytes that were written here. The cache is an
optimisation: where it cannot be read or written, kernels are compiled again.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

from latentrt.bundle.digests import hash_bytes, read_at_most
from latentrt.bundle.user_cache import open_own, write_own

__all__ = ["RuntimeCache"]

_SUFFIX = ".rtcache"
_MAX_BYTES = 1 << 30
_log = logging.getLogger("latentrt")


class RuntimeCache:
    """The compiled kernels of one engine.

    Args:
        folder: the engine's folder in the user's cache.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cache: Any = None
        self._saved = b""

    def attach(self, config: Any) -> None:
        """Load the stored kernels into a runtime configuration, which collects further ones."""
        self._cache = config.create_runtime_cache()
        self._saved = self._read()
        if self._saved and not self._cache.deserialize(self._saved):
            _log.info("%s: the stored kernels belong to another driver or GPU and are compiled again", self._folder)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Store the kernels compiled so far, if there are new ones."""
        if self._cache is None:
            return
        data = bytes(memoryview(self._cache.serialize()))
        if data and data != self._saved:
            with contextlib.suppress(OSError):
                self._folder.mkdir(mode=0o700, exist_ok=True)
                name = f"{hash_bytes(data)}{_SUFFIX}"
                write_own(self._folder / name, data)
                for other in self._folder.glob(f"*{_SUFFIX}"):
                    if other.name != name:
                        other.unlink(missing_ok=True)
            self._saved = data

    def _read(self) -> bytes:
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            with contextlib.suppress(OSError), open_own(path) as stream:
                data = read_at_most(stream, _MAX_BYTES)
                if f"{hash_bytes(data)}{_SUFFIX}" == path.name:
                    return data
                _log.warning("%s does not have the contents it was written with, and is deleted", path)
                path.unlink(missing_ok=True)
        return b""

"""The cache of graphs that OpenVINO has compiled.

It is a folder of the user's cache, beside the engines, with one file for each graph and set of shapes. A file begins
with the SHA-256 of its name and of the rest, so that the library reads only bytes that were written here, for this
graph. The cache is an optimisation: where it cannot be read or written, graphs are compiled again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from latentrt.bundle.digests import read_at_most
from latentrt.bundle.user_cache import open_own, private_folder, write_own

__all__ = ["CompiledCache"]

_FOLDER, _SUFFIX = "compiled", ".ovc"
_DIGEST_BYTES = 32
# Beyond these limits the least recently used files are deleted: another version or bundle leaves files that are never
# read again.
_MAX_FILES, _MAX_BYTES = 256, 4 << 30
# Drafts older than this were left by a killed process; writing one takes far less.
_ABANDONED_S = 3600
_log = logging.getLogger("latentrt")


class CompiledCache:
    """The compiled models of one graph.

    Args:
        folder: of the compiled models of all graphs.
        identity: everything the compiled models depend on except their shapes.
    """

    def __init__(self, folder: Path, identity: Sequence[str]) -> None:
        self._folder, self._identity = folder, tuple(identity)

    @classmethod
    def open(cls, identity: Sequence[str]) -> CompiledCache | None:
        """Return the cache of a graph; None where this user has no cache folder."""
        folder = private_folder(_FOLDER)
        return None if folder is None else cls(folder, identity)

    def read(self, shapes: Mapping[str, Sequence[int]]) -> bytes:
        """Return the compiled model for these shapes; b"" where it is missing or its hash does not match."""
        path = self._path(shapes)
        with contextlib.suppress(OSError):
            with open_own(path) as stream:
                digest, data = stream.read(_DIGEST_BYTES), read_at_most(stream, _MAX_BYTES)
            if data and _digest(path, data) == digest:
                os.utime(path)  # the time of last use, for `_sweep`
                return data
            _log.warning("%s does not have the contents it was written with, and is deleted", path)
            path.unlink(missing_ok=True)
        return b""

    def write(self, shapes: Mapping[str, Sequence[int]], data: bytes) -> None:
        """Store the compiled model for these shapes."""
        with contextlib.suppress(OSError):
            path = self._path(shapes)
            write_own(path, _digest(path, data) + data)
            self._sweep()

    def _sweep(self) -> None:
        """Delete the least recently used files beyond the limits, and drafts of killed processes."""
        found = [(path, path.lstat()) for path in self._folder.iterdir()]
        kept, size = 0, 0
        for path, state in sorted(found, key=lambda each: each[1].st_mtime, reverse=True):
            if path.suffix != _SUFFIX:
                expired = state.st_mtime < time.time() - _ABANDONED_S
            else:
                kept, size = kept + 1, size + state.st_size
                expired = kept > _MAX_FILES or (size > _MAX_BYTES and kept > 1)
            if expired:
                path.unlink(missing_ok=True)

    def refuse(self, shapes: Mapping[str, Sequence[int]], error: Exception) -> None:
        """Delete the compiled model for these shapes, which the library could not load."""
        _log.info("%s is compiled again: %s", self._path(shapes), error)
        with contextlib.suppress(OSError):
            self._path(shapes).unlink(missing_ok=True)

    def _path(self, shapes: Mapping[str, Sequence[int]]) -> Path:
        readable = json.dumps([self._identity, {name: list(shape) for name, shape in shapes.items()}], sort_keys=True)
        return self._folder / f"{hashlib.sha256(readable.encode()).hexdigest()}{_SUFFIX}"


def _digest(path: Path, data: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + data).digest()

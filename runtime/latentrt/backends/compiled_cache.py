"""Where does OpenVINO's backend keep graphs that it has compiled?

In the user's own cache, beside the engines: a file for each graph and set of shapes, which begins with the SHA-256 of
the rest, so that what is handed to the library is what was written. It is an optimisation: where it cannot be read or
written, graphs are compiled again.
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

from latentrt.bundle.atomic_file import write_atomically
from latentrt.bundle.digests import open_regular
from latentrt.bundle.user_cache import private_folder

__all__ = ["CompiledCache"]

_FOLDER, _SUFFIX = "compiled", ".ovc"
_DIGEST_BYTES = 32
# Those that were not used for longest go when there are more, as a change of version or of a bundle leaves files that
# nobody asks for again.
_MOST_FILES, _MOST_BYTES = 256, 4 << 30
# A file that a killed process did not finish; nobody needs as long to write one.
_FORSAKEN_S = 3600
_log = logging.getLogger("latentrt")


class CompiledCache:
    """The compiled models of one graph.

    Args:
        folder: of all of them. identity: what they depend on, beside their shapes.
    """

    def __init__(self, folder: Path, identity: Sequence[str]) -> None:
        self._folder, self._identity = folder, tuple(identity)

    @classmethod
    def open(cls, identity: Sequence[str]) -> CompiledCache | None:
        """The cache of a graph; None where this user has none."""
        folder = private_folder(_FOLDER)
        return None if folder is None else cls(folder, identity)

    def read(self, shapes: Mapping[str, Sequence[int]]) -> bytes:
        """What was compiled for these shapes; nothing if that is not there, or not what was written."""
        path = self._path(shapes)
        with contextlib.suppress(OSError), open_regular(path) as stream:
            digest, data = stream.read(_DIGEST_BYTES), stream.read()
            if data and hashlib.sha256(data).digest() == digest:
                os.utime(path)  # it was used
                return data
            _log.warning("%s is not what was written, and is deleted", path)
            path.unlink(missing_ok=True)
        return b""

    def write(self, shapes: Mapping[str, Sequence[int]], data: bytes) -> None:
        """Keep what was compiled."""
        with contextlib.suppress(OSError):
            write_atomically(self._path(shapes), hashlib.sha256(data).digest() + data, mode=0o600)
            self._sweep()

    def _sweep(self) -> None:
        """Let go what is too much, and what a killed process left."""
        found = [(path, path.stat()) for path in self._folder.iterdir()]
        kept, size = 0, 0
        for path, state in sorted(found, key=lambda each: each[1].st_mtime, reverse=True):
            if path.suffix != _SUFFIX:
                forsaken = state.st_mtime < time.time() - _FORSAKEN_S
            else:
                kept, size = kept + 1, size + state.st_size
                forsaken = kept > _MOST_FILES or (size > _MOST_BYTES and kept > 1)
            if forsaken:
                path.unlink(missing_ok=True)

    def refuse(self, shapes: Mapping[str, Sequence[int]], error: Exception) -> None:
        """What was kept cannot be used."""
        _log.info("%s is compiled again: %s", self._path(shapes), error)
        with contextlib.suppress(OSError):
            self._path(shapes).unlink(missing_ok=True)

    def _path(self, shapes: Mapping[str, Sequence[int]]) -> Path:
        readable = json.dumps([self._identity, {name: list(shape) for name, shape in shapes.items()}], sort_keys=True)
        return self._folder / f"{hashlib.sha256(readable.encode()).hexdigest()}{_SUFFIX}"

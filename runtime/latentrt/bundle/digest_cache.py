"""A cache of SHA-256 digests of large files, kept between runs.

Hashing a bundle's weights takes about as long as reading them, so digests are stored between runs: the record of a file
is keyed by (device, inode, size, mtime, ctime). Writing to a file advances its ctime, and no call sets a ctime back, so
a file that was changed after it was hashed no longer matches its record, even if its mtime was restored.

A record is written and trusted only where that argument holds:

- the file belongs to the user or to root, and neither group nor others may write to it (never so on Windows, whose
  ctime is the time of creation);
- its ctime was at least a minute old when hashing began, and did not change during it. Clocks are coarse: a change
  within the clock tick in which the file was hashed would be invisible (git calls such a file racily clean). Pages that
  some process has mapped for writing advance the ctime only when they are written back, which Linux does within half a
  minute;
- the cache's folder is private to the user (`latentrt.bundle.user_cache`), and so is the record in it.

Not detected are a disk that returns other bytes than were written, a file system without ctime (FAT), a clock that was
set back, and attackers who run as the same user or as root. `Bundle.verify`, and opening with `trust_cache=False`, hash
regardless of any record.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from latentrt.bundle.digests import read_at_most
from latentrt.bundle.strict_json import AmbiguousJSONError, StrictDecoder
from latentrt.bundle.user_cache import is_closed, open_own, private_folder, write_own

__all__ = ["DigestCache", "FileState"]

# Below this, hashing a file (a millisecond per MiB) costs no more than reading its record.
_SMALLEST_BYTES = 1 << 20
_SETTLED_NS = 60 * 10**9
_MAX_RECORD_BYTES = 4096


class FileState(msgspec.Struct, frozen=True):
    """The identity, size and times of a file, which change whenever its content does."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    state: FileState
    sha256: str


_DECODER = StrictDecoder(_Record, max_bytes=_MAX_RECORD_BYTES)


class DigestCache:
    """Stored SHA-256 digests, one small file for each file of a bundle, named by device and inode.

    No method raises: where the cache cannot be used, nothing is stored.
    """

    def __init__(self) -> None:
        self._folder = private_folder("digests")

    def get(self, found: os.stat_result) -> str | None:
        """Return the digest that was stored for a file in exactly this state, None if there is none."""
        if self._folder is None or not is_closed(found):
            return None
        state = FileState.of(found)
        with contextlib.suppress(OSError, AmbiguousJSONError):
            record = _DECODER.decode(_read(_record_path(self._folder, state)))
            return record.sha256 if record.state == state else None
        return None

    def put(self, found: os.stat_result, sha256: str, hashed_at_ns: int) -> None:
        """Store the digest of a file in the state `found`, if that is safe.

        Args:
            found: the file's state before and after hashing.
            sha256: in lower-case hexadecimal.
            hashed_at_ns: time at which hashing began, in nanoseconds since the epoch.
        """
        if self._folder is None or not is_closed(found) or found.st_size < _SMALLEST_BYTES:
            return
        if found.st_ctime_ns + _SETTLED_NS > hashed_at_ns:
            return
        record = _Record(FileState.of(found), sha256)
        with contextlib.suppress(OSError):
            write_own(_record_path(self._folder, record.state), msgspec.json.encode(record))


def _record_path(folder: Path, state: FileState) -> Path:
    return folder / f"{state.device:x}-{state.inode:x}.json"


def _read(path: Path) -> bytes:
    with open_own(path) as stream:
        return read_at_most(stream, _MAX_RECORD_BYTES)

"""Locks that tell the unfinished files of a running process from those that a killed process left behind.

A process locks its unfinished file, or a file in its unfinished folder, for as long as it writes. The system releases
the lock when the process ends, however it ends, so a file that can be locked was left behind. A process id in its place
would be taken by another process sooner or later.

The filelock package has no such locks: it creates and truncates the file that it locks, and does not tell whether that
still has its name. It is used where a file is nothing but a lock (`latentrt_engines.cache`).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from latentrt.bundle.renames import RENAMES_OPEN_FILES

if sys.platform == "win32":
    import errno
    import msvcrt
else:
    import fcntl

__all__ = ["FIRST_BYTE", "LockedFile", "claim", "create_locked", "is_own", "list_matching"]

FIRST_BYTE = 0
"""The byte that the filelock package locks on Windows."""
# On Windows a lock covers bytes, which no other process can read meanwhile: this one is behind the content.
_FAR_BYTE = (1 << 31) - 2
# A folder may hold any number of files; ten thousand names are read in ten milliseconds.
_MAX_ENTRIES = 10_000


class LockedFile:
    """A file that this process has locked, until it is closed.

    Attributes:
        path: its path.
        descriptor: open for reading and writing; -1 once it is closed.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor

    def close(self) -> None:
        """Close the file, which releases the lock. Without effect the second time."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor != -1:
            os.close(descriptor)

    def remove(self) -> None:
        """Remove the file and close it, in this order where the system can: nobody else may lock it in between.

        Where it cannot (Windows), the file also stays if another process has opened it in between.

        Raises:
            OSError: it could not be removed; it is closed.
        """
        if not RENAMES_OPEN_FILES:
            self.close()
        try:
            os.unlink(self.path)
        finally:
            if RENAMES_OPEN_FILES:
                self.close()


def create_locked(path: Path, mode: int = 0o600) -> LockedFile | None:
    """Create a file and lock it until it is closed.

    Where the file system has no locks the file is created all the same, and never counts as left behind.

    Returns:
        The file; None if another process took it for one that was left behind and removes it: it could not see the lock
        yet. Choose another name.

    Raises:
        OSError: the file exists or cannot be created.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    created = LockedFile(path, descriptor)
    try:
        is_locked = _lock(descriptor, _FAR_BYTE)
    except OSError:
        return created
    if is_locked and _is_at(descriptor, path):
        return created
    with contextlib.suppress(OSError):  # removed by the other process, or (Windows) open there
        created.remove()
    return None


@contextlib.contextmanager
def claim(path: Path, byte: int = _FAR_BYTE) -> Iterator[LockedFile | None]:
    """Lock a file that another process may have left behind, and yield it if it did.

    None for a file that its process still has locked, that is not a regular file of this user, or that is on a file
    system without locks.

    Args:
        byte: the one that its process locks, on Windows.
    """
    found = _lock_existing(path, byte)
    try:
        yield found
    finally:
        if found is not None:
            found.close()


def is_own(found: os.stat_result) -> bool:
    """Return whether a file belongs to the user of this process; on Windows always, where its ACL decides instead."""
    return sys.platform == "win32" or found.st_uid == os.geteuid()


def list_matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Return the entries of a folder whose whole names match, among its first 10,000; [] where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return [
                folder / entry.name
                for entry in itertools.islice(entries, _MAX_ENTRIES)
                if pattern.fullmatch(entry.name)
            ]
    except OSError:
        return []


def _lock(descriptor: int, byte: int) -> bool:
    """Lock an open file, on Windows one byte of it; return False if another process has locked it.

    Raises:
        OSError: the file system has no locks.
    """
    if sys.platform == "win32":
        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, byte, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EDEADLK):
                raise
            return False
        finally:
            os.lseek(descriptor, position, os.SEEK_SET)
    else:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


# A link is not followed, and a pipe does not block, where the system has the flags for that.
_SAFELY = os.O_RDWR | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def _lock_existing(path: Path, byte: int) -> LockedFile | None:
    try:
        descriptor = os.open(path, _SAFELY)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        found = os.fstat(descriptor)
        is_candidate = stat.S_ISREG(found.st_mode) and is_own(found)
        if is_candidate and _lock(descriptor, byte) and _is_at(descriptor, path):
            return LockedFile(path, descriptor)
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has the name `path`."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False

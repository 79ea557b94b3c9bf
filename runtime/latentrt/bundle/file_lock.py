"""Locks that tell the unfinished files of a running process from those that a killed process left behind.

A process locks its unfinished file, or a file in its unfinished folder, for as long as it writes. The system releases
the lock when the process ends, however it ends, so a file that can be locked was left behind. A process id in its place
would be taken by another process sooner or later.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nothing is locked, and nothing counts as left behind
    fcntl = None  # type: ignore[assignment]

__all__ = ["CAN_LOCK", "claim", "create_locked", "is_own", "list_matching"]

CAN_LOCK = fcntl is not None
"""Whether this system has such locks."""
# A folder may hold any number of files; ten thousand names are read in ten milliseconds.
_MAX_ENTRIES = 10_000


def create_locked(path: Path, mode: int = 0o600) -> int | None:
    """Create a file and lock it until its descriptor is closed.

    Where the file system has no locks the file is created all the same, and never counts as left behind.

    Returns:
        The descriptor, open for writing; None if another process took the file for one that was left behind and
        removes it: it could not see the lock yet. Choose another name.

    Raises:
        OSError: the file exists or cannot be created.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, mode)
    if fcntl is None:
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass
    except OSError:
        return descriptor
    else:
        if _is_at(descriptor, path):
            return descriptor
    os.close(descriptor)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    return None


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Lock a file that another process may have left behind, and yield whether it did.

    It is False for a file that its process still has locked, that is not a regular file of this user, or that is on a
    system without locks.
    """
    descriptor = _lock_existing(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def is_own(found: os.stat_result) -> bool:
    """Return whether a file belongs to the user of this process."""
    return hasattr(os, "geteuid") and found.st_uid == os.geteuid()


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


def _lock_existing(path: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and is_own(found):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
    except OSError:
        pass
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file still has the name `path`."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False

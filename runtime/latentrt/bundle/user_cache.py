"""The user's cache folder, which must be private.

`LATENTRT_CACHE` names the folder; the default is `latentrt` in `XDG_CACHE_HOME` or `~/.cache`. Its content is trusted,
so it must belong to the user who runs this process and be inaccessible to others (mode 0700).
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from io import BufferedReader
from pathlib import Path

from latentrt.bundle.atomic_file import write_atomically
from latentrt.errors import EngineError

__all__ = ["cache_root", "is_closed", "open_own", "private_folder", "require_private_folder", "write_own"]

_log = logging.getLogger(__name__)


def cache_root() -> Path | None:
    """Return the folder of this user's latentrt cache, whether or not it exists; None for a user without a home."""
    if chosen := os.environ.get("LATENTRT_CACHE"):
        return Path(chosen).absolute()
    # The XDG specification demands that a relative path is ignored.
    if (xdg := os.environ.get("XDG_CACHE_HOME", "")) and os.path.isabs(xdg):
        return Path(xdg) / "latentrt"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    # An empty HOME would be the root of the file system, a relative one another folder wherever a command runs.
    is_usable = os.environ.get("HOME") != "" and home.is_absolute()
    return home / ".cache" / "latentrt" if is_usable else None


def private_folder(name: str) -> Path | None:
    """Return the folder `name` of the cache, created if missing; None if it cannot be made or is open to others.

    The absence of a cache is logged, as a warning if the user named the folder; it is never an error.
    """
    try:
        return require_private_folder(name)
    except EngineError as error:
        _log_once(logging.WARNING if os.environ.get("LATENTRT_CACHE") else logging.INFO, str(error))
        return None


@functools.cache
def _log_once(level: int, problem: str) -> None:
    """Log a problem once per process."""
    _log.log(level, "nothing is cached: %s", problem)


def require_private_folder(name: str) -> Path:
    """Return the folder `name` of the cache, created if missing.

    Raises:
        EngineError: it cannot be made or is open to others; the message names the folder, the problem and the remedy.
    """
    root = cache_root()
    if root is None:
        raise EngineError("this user has no home to keep a cache in; name a folder with LATENTRT_CACHE")
    for folder in (root, root / name):
        if problem := _make_private(folder):
            or_else = ", or" if "chmod" in problem else ";"
            raise EngineError(f"{folder} {problem}{or_else} name another folder with LATENTRT_CACHE")
    return root / name


def is_closed(found: os.stat_result) -> bool:
    """Return whether only its owner, who is this user or root, may write to a file."""
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def open_own(path: Path) -> BufferedReader:
    """Open a file of the cache that only this user or root may write to.

    Raises:
        PermissionError: others may write to it. OSError: it cannot be opened, is a link or not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    stream = os.fdopen(descriptor, "rb")
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and is_closed(found):
        return stream
    stream.close()
    raise PermissionError(errno.EPERM, "others may write to it, or it is not a file", os.fspath(path))


def write_own(path: Path, data: bytes) -> None:
    """Write a file of the cache by rename, for this user only. A link in its place is replaced and not followed.

    Raises:
        OSError: nothing was written.
    """
    if path.is_symlink():
        path.unlink()
    write_atomically(path, data, mode=0o600)


def _make_private(folder: Path) -> str | None:
    """Create the folder if missing. Return the problem with it as a predicate, or None."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        return f"cannot be made: {error.strerror}"
    return _find_exposure(found)


def _find_exposure(found: os.stat_result) -> str | None:
    """Return the problem with a folder's owner or permissions as a predicate, or None."""
    if not hasattr(os, "geteuid"):
        return "is on a system whose permissions latentrt cannot check"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder of its own (a link is not followed)"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, expected {os.geteuid()}"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):03o}, expected 700); chmod 700 it"
    return None

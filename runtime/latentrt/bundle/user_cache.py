"""The user's cache folder, which must be private.

`LATENTRT_CACHE` names the folder; the default is the system's place for caches: `latentrt` in `XDG_CACHE_HOME` or
`~/.cache` on Linux, `~/Library/Caches/latentrt` on macOS, `%LOCALAPPDATA%\\latentrt\\Cache` on Windows. Its content is
trusted, so it must belong to the user who runs this process and be inaccessible to others (mode 0700). Windows has no
such modes; there the folder must be in the user's profile, whose access list excludes other users.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import stat
import sys
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
    import platformdirs  # here, as a run without a cache does not need it

    with contextlib.suppress(OSError, RuntimeError, ValueError):  # a user without a home or a profile
        # A relative one would be another folder wherever a command runs.
        if (found := platformdirs.user_cache_path("latentrt", appauthor=False)).is_absolute():
            return found
    return None


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
    """Return whether only its owner, who is this user or root, may write to a file; on Windows nobody can tell."""
    if sys.platform == "win32":
        return False
    return found.st_uid in (0, os.geteuid()) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def open_own(path: Path) -> BufferedReader:
    """Open a file of the cache that only this user or root may write to.

    Raises:
        PermissionError: others may write to it. OSError: it cannot be opened, is a link or not a regular file.
    """
    # Windows has neither flag; its folder is in the user's profile, so that nobody else puts a link there.
    flags = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK"))
    stream = open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags))  # noqa: SIM115, the caller closes it
    found = os.fstat(stream.fileno())
    if stat.S_ISREG(found.st_mode) and (sys.platform == "win32" or is_closed(found)):
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
    return _find_exposure(folder, found)


def _find_exposure(folder: Path, found: os.stat_result) -> str | None:
    """Return the problem with a folder's owner, permissions or place as a predicate, or None."""
    if not stat.S_ISDIR(found.st_mode):
        return "is not a folder of its own (a link is not followed)"
    if sys.platform == "win32":
        return _find_place_outside(folder)
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, expected {os.geteuid()}"
    if stat.S_IMODE(found.st_mode) & 0o077:
        return f"is open to others (mode {stat.S_IMODE(found.st_mode):03o}, expected 700); chmod 700 it"
    return None


def _find_place_outside(folder: Path) -> str | None:
    """Return the problem with a folder that is not in the user's profile (Windows) as a predicate, or None."""
    import platformdirs

    real = Path(os.path.realpath(folder))
    own = [Path(os.path.realpath(place)) for place in (Path.home(), platformdirs.user_cache_path())]
    if any(real.is_relative_to(place) and real != place for place in own):
        return None
    return f"is outside of your profile ({own[0]}), where other users may write"

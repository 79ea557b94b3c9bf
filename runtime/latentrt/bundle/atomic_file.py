"""Atomic replacement of a file."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], data: bytes, mode: int = 0o666) -> None:
    """Write a file by rename: readers see the former file or the complete new one, even after a failure.

    Args:
        path: if it is a symbolic link, the link's target is replaced.
        data: the new content.
        mode: permissions of a new file, reduced by the umask.

    Raises:
        OSError: nothing was written, and the former file is unchanged.
    """
    place = Path(os.path.realpath(path))
    draft = place.with_name(f".{place.name[:32]}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            # After a power failure some file systems have the rename but not the data.
            os.fsync(descriptor)
        os.replace(draft, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise

"""Atomic replacement of a file."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], data: bytes, mode: int = 0o666) -> None:
    """Write a file by rename: readers find the earlier file or the whole new one, also after a failure.

    A link is followed, so that what it leads to is replaced and the link stays. `mode` is cut by the umask, as for
    any new file.

    Raises:
        OSError: nothing was written, and the earlier file is as it was.
    """
    place = Path(os.path.realpath(path))
    draft = place.with_name(f".{place.name[:32]}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            # Some file systems keep a rename and lose the data when the power fails.
            os.fsync(descriptor)
        os.replace(draft, place)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(draft)
        raise

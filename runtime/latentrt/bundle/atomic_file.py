"""Atomic replacement of a file.

The new content is written to a draft beside the file, which then takes the file's place. A draft that a killed process
left behind is removed by the next process that writes a file to the same folder.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import secrets
from pathlib import Path

from latentrt.bundle.file_lock import CAN_LOCK, claim, create_locked, list_matching
from latentrt.bundle.interrupts import uninterrupted

__all__ = ["find_abandoned_drafts", "remove_abandoned_drafts", "write_atomically"]

_DRAFT = re.compile(r"\..{1,32}\.[0-9a-f]{16}\.latentrt-draft", re.DOTALL)


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
    _remove_drafts_once(place.parent)
    draft = None
    try:
        with uninterrupted():
            draft, descriptor = _create_draft(place, mode)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            # After a power failure some file systems have the rename but not the data.
            os.fsync(descriptor)
            if CAN_LOCK:  # renamed while it is locked, so that no other process removes it in between
                os.replace(draft, place)
        if not CAN_LOCK:  # Windows renames closed files only
            os.replace(draft, place)
    except BaseException:
        if draft is not None:
            with contextlib.suppress(OSError):
                os.unlink(draft)
        raise


def _create_draft(place: Path, mode: int) -> tuple[Path, int]:
    while True:
        draft = place.with_name(f".{place.name[:32]}.{secrets.token_hex(8)}.latentrt-draft")
        if (descriptor := create_locked(draft, mode)) is not None:
            return draft, descriptor


@functools.lru_cache(maxsize=256)
def _remove_drafts_once(folder: Path) -> None:
    """Remove the folder's abandoned drafts once per process: a folder of many images takes long to list."""
    remove_abandoned_drafts(folder)


def remove_abandoned_drafts(folder: Path) -> None:
    """Remove drafts that killed processes of this user left in a folder; those being written are kept."""
    for draft in list_matching(folder, _DRAFT):
        with contextlib.suppress(OSError), claim(draft) as abandoned:
            if abandoned:
                os.unlink(draft)


def find_abandoned_drafts(folder: Path) -> list[Path]:
    """Return the drafts that `remove_abandoned_drafts` would remove."""
    found = []
    for draft in list_matching(folder, _DRAFT):
        with claim(draft) as abandoned:
            if abandoned:
                found.append(draft)
    return found

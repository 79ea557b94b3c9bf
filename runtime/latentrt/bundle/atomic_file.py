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

from latentrt.bundle.file_lock import LockedFile, claim, create_locked, list_matching
from latentrt.bundle.interrupts import uninterrupted
from latentrt.bundle.renames import RENAMES_OPEN_FILES, replace_file

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
    while not _write_and_rename(place, data, mode):
        pass


def _write_and_rename(place: Path, data: bytes, mode: int) -> bool:
    """Write a draft and rename it; return False if another process took it for one that was left behind (Windows)."""
    draft = None
    try:
        with uninterrupted():
            draft = _create_draft(place, mode)
        with os.fdopen(draft.descriptor, "wb", closefd=False) as stream:
            stream.write(data)
            stream.flush()
            # After a power failure some file systems have the rename but not the data.
            os.fsync(draft.descriptor)
        # Renamed while it is locked where the system can, so that no other process removes it in between.
        if not RENAMES_OPEN_FILES:
            draft.close()
        replace_file(draft.path, place)
        draft.close()
    except BaseException as error:
        is_gone = draft is not None and isinstance(error, FileNotFoundError) and not os.path.lexists(draft.path)
        if draft is not None:
            with contextlib.suppress(OSError):
                draft.remove()
        if is_gone and not RENAMES_OPEN_FILES:
            return False
        raise
    return True


def _create_draft(place: Path, mode: int) -> LockedFile:
    while True:
        draft = place.with_name(f".{place.name[:32]}.{secrets.token_hex(8)}.latentrt-draft")
        if (created := create_locked(draft, mode)) is not None:
            return created


@functools.lru_cache(maxsize=256)
def _remove_drafts_once(folder: Path) -> None:
    """Remove the folder's abandoned drafts once per process: a folder of many images takes long to list."""
    remove_abandoned_drafts(folder)


def remove_abandoned_drafts(folder: Path) -> None:
    """Remove drafts that killed processes of this user left in a folder; those being written are kept."""
    for draft in list_matching(folder, _DRAFT):
        with contextlib.suppress(OSError), claim(draft) as abandoned:
            if abandoned is not None:
                abandoned.remove()


def find_abandoned_drafts(folder: Path) -> list[Path]:
    """Return the drafts that `remove_abandoned_drafts` would remove."""
    found = []
    for draft in list_matching(folder, _DRAFT):
        with claim(draft) as abandoned:
            if abandoned is not None:
                found.append(draft)
    return found

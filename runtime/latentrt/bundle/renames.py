"""Renames of files and folders, also on Windows, where a file that is open keeps its name.

POSIX systems rename and remove a file whether or not it is open. Windows does neither, nor does it rename a folder with
an open file in it. A virus scanner or an indexer opens each new file for a moment, so a rename is tried again there.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["RENAMES_OPEN_FILES", "rename_folder", "replace_file"]

RENAMES_OPEN_FILES = sys.platform != "win32"
"""Whether this system renames and removes files that are open."""
_PATIENCE_SECONDS, _PAUSE_SECONDS = 2.0, 0.02


def replace_file(source: Path, target: Path) -> None:
    """Rename a file; an earlier file of that name is replaced.

    Raises:
        OSError: the rename failed. PermissionError on Windows also if another program keeps either file open.
    """
    _rename_patiently(lambda: os.replace(source, target), target)


def rename_folder(source: Path, target: Path) -> None:
    """Rename a folder.

    Raises:
        OSError: as `replace_file`; on Windows also if a file in the folder is open.
    """
    _rename_patiently(lambda: source.rename(target), target)


def _rename_patiently(rename: Callable[[], object], target: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            rename()
            return
        except PermissionError as error:
            if RENAMES_OPEN_FILES:
                raise
            if time.monotonic() > deadline:
                reason = "access is denied, most likely because another program has it or a file in it open; close that"
                raise PermissionError(errno.EACCES, reason, os.fspath(target)) from error
        time.sleep(_PAUSE_SECONDS)

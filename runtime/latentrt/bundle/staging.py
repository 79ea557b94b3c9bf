"""Writes a bundle in a staging folder, which replaces the destination once it is complete."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentrt.errors import OutputError

__all__ = ["Stage", "staged"]


@dataclass(frozen=True)
class Stage:
    """The folder that a bundle is written to, and a folder for temporary files."""

    bundle: Path
    scratch: Path


@contextlib.contextmanager
def staged(destination: Path, *, overwrite: bool) -> Iterator[Stage]:
    """Yield two folders to work in. On success the bundle is moved to `destination`; on failure both are removed.

    They are in a hidden folder beside `destination`, on the disk that needs room for the weights anyway (a system's
    temporary folder is often in memory), so that a rename suffices. Only a process that is killed leaves that folder
    behind.

    Args:
        destination: of the bundle. If it is a symbolic link, the link's target is replaced.
        overwrite: replace an existing bundle.

    Raises:
        OutputError: `destination` exists without `overwrite`, is not a bundle, or cannot be written.
    """
    place = Path(os.path.realpath(destination))
    _check_destination(place, destination, overwrite=overwrite)
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix=f".{place.name}.export-", dir=place.parent))
    except OSError as error:
        # A file where a folder should be: the system's error depends on how deep below it the folder would be.
        reason = "not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise OutputError(f"{place.parent} cannot be written to: {reason}") from error
    former = root / "former"
    try:
        stage = Stage(bundle=root / "bundle", scratch=root / "scratch")
        stage.bundle.mkdir()
        stage.scratch.mkdir()
        yield stage
        # Checked again: another process may have created the destination meanwhile.
        _check_destination(place, destination, overwrite=overwrite)
        _move_bundle(stage.bundle, place, former if overwrite else None)
    except OSError as error:
        reason = error.strerror or str(error)
        kept = f"is in {former}" if former.exists() and not place.exists() else "is untouched"
        raise OutputError(f"{destination} cannot be written: {reason}; its former content {kept}") from error
    finally:
        if place.exists() or not former.exists():  # never delete the only copy of the former bundle
            shutil.rmtree(root, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # not empty, as it contains the bundle
                parent.rmdir()


def _check_destination(place: Path, destination: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(place):
        return
    if not overwrite:
        raise OutputError(
            f"{destination} exists; choose another path, or --overwrite to replace it when the new bundle is complete"
        )
    if not (place / "bundle.json").is_file():
        raise OutputError(f"{destination} is not a bundle, so --overwrite does not replace it; choose another path")


def _move_bundle(bundle: Path, place: Path, former: Path | None) -> None:
    """Rename the bundle to `place`.

    Args:
        former: the path that an earlier bundle is moved to; None if there must be no earlier one.
    """
    if former is None or not os.path.lexists(place):
        bundle.rename(place)  # fails where a folder that is not empty was created meanwhile
        return
    try:
        place.rename(former)
        bundle.rename(place)
    finally:
        # Also on a signal between the two renames, or right after either.
        if former.exists() and not place.exists():
            former.rename(place)

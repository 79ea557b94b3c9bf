"""Makes a bundle in a staging folder, which takes its place when it is complete."""

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
    """The folder in which a bundle is made, and a folder for temporary files."""

    bundle: Path
    scratch: Path


@contextlib.contextmanager
def staged(destination: Path, *, overwrite: bool) -> Iterator[Stage]:
    """Yield two folders to work in; the bundle takes `destination`'s place on success, else both are removed.

    They lie in a hidden folder beside `destination`, where there has to be room for weights anyway (a temporary file
    system is often memory) and from where a rename is enough. A process that is killed outright leaves that folder
    behind, and nothing else.

    Raises:
        OutputError: something is in the way, or cannot be written.
    """
    # A link stays, and what it leads to is replaced.
    place = Path(os.path.realpath(destination))
    _refuse_occupied(place, destination, overwrite=overwrite)
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        root = Path(tempfile.mkdtemp(prefix=f".{place.name}.export-", dir=place.parent))
    except OSError as error:
        # A file in the way: what the system says of it depends on how deep below it the folder would be.
        reason = "not a folder" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise OutputError(f"{place.parent} cannot be written to: {reason}") from error
    former = root / "former"
    try:
        stage = Stage(bundle=root / "bundle", scratch=root / "scratch")
        stage.bundle.mkdir()
        stage.scratch.mkdir()
        yield stage
        # Once more: the work may have taken long, and somebody else may have been there.
        _refuse_occupied(place, destination, overwrite=overwrite)
        _take_place(stage.bundle, place, former if overwrite else None)
    except OSError as error:
        reason = error.strerror or str(error)
        kept = f"is in {former}" if former.exists() and not place.exists() else "is untouched"
        raise OutputError(f"{destination} cannot be written: {reason}; what was there before {kept}") from error
    finally:
        if place.exists() or not former.exists():  # or what was there before is here alone
            shutil.rmtree(root, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # it is not empty: the bundle is there
                parent.rmdir()


def _refuse_occupied(place: Path, destination: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(place):
        return
    if not overwrite:
        raise OutputError(
            f"{destination} exists; choose another place, or --overwrite to replace it when the new bundle is complete"
        )
    if not (place / "bundle.json").is_file():
        raise OutputError(f"{destination} is not a bundle, so --overwrite does not replace it; choose another place")


def _take_place(bundle: Path, place: Path, former: Path | None) -> None:
    """Rename the bundle to its place; `former` is where an earlier one is moved, None if there must be none."""
    if former is None or not os.path.lexists(place):
        bundle.rename(place)  # which fails where a folder with something in it has come meanwhile
        return
    try:
        place.rename(former)
        bundle.rename(place)
    finally:
        # Also when a signal comes between the two, or right after either.
        if former.exists() and not place.exists():
            former.rename(place)

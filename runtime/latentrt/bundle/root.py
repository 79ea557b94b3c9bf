"""The folder that must contain all files of a bundle.

A file of a bundle may be a symbolic link, as in a hub cache. But a link to a path outside the download could make
latentrt open any file of the machine, so its target must be in the bundle's own folder or, in a hub cache, in that
repository's folder::

    models--owner--name/blobs/4f0c…                         the files, by their digest
    models--owner--name/snapshots/<revision>/bundle.json    links to them
"""

from __future__ import annotations

import os
from pathlib import Path

from latentrt.errors import IntegrityError

__all__ = ["BundleRoot", "find_root"]


class BundleRoot:
    """The root of a bundle in `folder`.

    Args:
        folder: the bundle's folder. Links on the way to it are the user's own, and followed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.root = find_root(folder)

    def resolve(self, name: str) -> Path:
        """Return the real path of the bundle's file `name`.

        Raises:
            IntegrityError: it is missing, or is a link whose target is missing or outside the root.
        """
        try:
            place = Path(os.path.realpath(self.folder / name, strict=True))
        except OSError as error:
            raise IntegrityError(f"{name} is missing ({error.strerror})") from None
        if not place.is_relative_to(self.root):
            raise IntegrityError(f"{name} is a link that leads to {place}, expected it to stay inside {self.root}")
        return place


def find_root(folder: Path) -> Path:
    """Return the real path that the files of a download must be in: its folder or, in a hub cache, its repository's."""
    real = Path(os.path.realpath(folder))
    return _hub_repository(real) or real


def _hub_repository(folder: Path) -> Path | None:
    """Return the folder of the hub cache's repository that `folder`, a snapshot or a folder in one, belongs to."""
    for revision in (folder, *folder.parents):
        snapshots = revision.parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--"):
            return snapshots.parent
    return None

"""A graph and its weights for a library that opens them by name and follows no link.

A hub cache is made of links: `unet/model.safetensors` leads to a file that is named for its hash, in another folder.
OpenVINO refuses weights that lie outside of the graph's own folder, so there they get a second name (a hard link)
beside a copy of the graph, for as long as it takes to map them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from latentrt.errors import BackendError
from latentrt.user_cache import require_private_folder

__all__ = ["real_files"]


@contextlib.contextmanager
def real_files(graph: Path, weights: Path) -> Iterator[Path]:
    """Where a graph can be opened by name, with its weights beside it under the name that the graph has for them.

    Raises:
        BackendError: they are links, and their files cannot have another name in this user's cache.
        EngineError: there is no cache to do that in.
    """
    if not graph.is_symlink() and not weights.is_symlink():
        yield graph
        return
    with tempfile.TemporaryDirectory(dir=require_private_folder("links")) as folder:
        place = Path(folder) / graph.name
        shutil.copyfile(graph, place)
        try:
            os.link(os.path.realpath(weights), place.with_name(weights.name))
        except OSError as error:
            raise BackendError(
                f"{weights} is a link, which OpenVINO does not follow, and its file cannot be linked to from {folder} "
                f"({error.strerror}); put LATENTRT_CACHE on the same disk, or copy the bundle without links (cp -rL)"
            ) from error
        yield place

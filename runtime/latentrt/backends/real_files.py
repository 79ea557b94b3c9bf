"""A graph and its weights for a library that opens them by name and follows no link.

A hub cache is made of links: `COMPONENT/model.safetensors` leads to a file named for its hash, in another folder.
OpenVINO refuses weights that lie outside of the graph's own folder, so there they get a second name (a hard link) in
the user's cache, and a copy of the graph stands beside it for as long as it takes to map them.

The second name stays: to make or remove one changes what tells that a file was not touched since it was hashed. Once
it is the only one left, the next to come by removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from latentrt.bundle.user_cache import require_private_folder
from latentrt.errors import BackendError

__all__ = ["linked_weights", "real_files"]


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
    folder = linked_weights(weights).parent
    with tempfile.NamedTemporaryFile(dir=folder, suffix=graph.suffix) as copy:
        copy.write(graph.read_bytes())
        copy.flush()
        yield Path(copy.name)


def linked_weights(weights: Path) -> Path:
    """Weights that a link leads to, under their own name in this user's cache; themselves where they are no link.

    Raises:
        BackendError, EngineError: as for `real_files`.
    """
    if not weights.is_symlink():
        return weights
    links, real = require_private_folder("links"), Path(os.path.realpath(weights))
    _remove_forsaken(links)
    place = links / hashlib.sha256(os.fsencode(real)).hexdigest() / weights.name
    try:
        place.parent.mkdir(mode=0o700, exist_ok=True)
        if place.exists() and not place.samefile(real):
            place.unlink()
        with contextlib.suppress(FileExistsError):
            os.link(real, place)
    except OSError as error:
        raise BackendError(
            f"{weights} is a link, which OpenVINO does not follow, and its file cannot be linked to from {links} "
            f"({error.strerror}); put LATENTRT_CACHE on the same disk, copy the bundle without links (cp -rL), or run "
            "it on ONNX Runtime: --device cpu"
        ) from error
    return place


def _remove_forsaken(links: Path) -> None:
    """Remove weights that have no other name any more."""
    for place in links.glob("*/*.safetensors"):
        with contextlib.suppress(OSError):
            if place.stat().st_nlink == 1:
                place.unlink()

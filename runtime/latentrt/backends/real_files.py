"""A graph and its weights as regular files, for a library that opens them by name and follows no symbolic link.

A hub cache consists of links: `COMPONENT/model.safetensors` leads to a file named for its hash, in another folder.
OpenVINO rejects weights outside the graph's own folder. So the weights get a second name (a hard link) in the user's
cache, and a copy of the graph is written beside it until the weights are mapped.

The hard link is kept, since making or removing one changes the file's ctime, which would have it hashed again. Once it
is the only name left, the next call of `linked_weights` removes it.
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
    """Yield a path to open a graph by, with its weights in the same folder under the name that the graph refers to.

    Raises:
        BackendError: the files are links, and the weights cannot be hard-linked from this user's cache.
        EngineError: this user has no cache.
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
    """Return a hard link, in this user's cache, to the weights that a symbolic link leads to; `weights` if it is none.

    Raises:
        BackendError, EngineError: as for `real_files`.
    """
    if not weights.is_symlink():
        return weights
    links, real = require_private_folder("links"), Path(os.path.realpath(weights))
    _remove_orphans(links)
    target = links / hashlib.sha256(os.fsencode(real)).hexdigest() / weights.name
    try:
        target.parent.mkdir(mode=0o700, exist_ok=True)
        if target.exists() and not target.samefile(real):
            target.unlink()
        with contextlib.suppress(FileExistsError):
            os.link(real, target)
    except OSError as error:
        raise BackendError(
            f"{weights} is a link, which OpenVINO does not follow, and its file cannot be hard-linked from {links} "
            f"({error.strerror}); put LATENTRT_CACHE on the same disk, copy the bundle without links (cp -rL), or run "
            "it on ONNX Runtime: --device cpu"
        ) from error
    return target


def _remove_orphans(links: Path) -> None:
    """Remove hard links whose file has no other name any more."""
    for target in links.glob("*/*.safetensors"):
        with contextlib.suppress(OSError):
            if target.stat().st_nlink == 1:
                target.unlink()

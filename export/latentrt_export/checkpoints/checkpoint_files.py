"""The rule for every file that an export reads from a checkpoint, or copies into a bundle.

A checkpoint is a download. A link in it that leads elsewhere could put any file of the machine into a bundle that is
published (`LICENSE -> ~/.ssh/id_rsa`), so a file must be in the checkpoint's own folder or, in a hub cache, in its
repository's (`latentrt.bundle.root`). Reading a pipe may never end, and a huge file fills the memory: a file must be
regular, and a text must be small.

The libraries that load weights and tokenizers open files by themselves, so whole folders are checked first.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentrt.bundle.digest_cache import FileState
from latentrt.bundle.digests import hash_stream, open_regular, read_at_most
from latentrt.bundle.root import find_root
from latentrt.errors import CheckpointError

__all__ = ["SourceFile", "check_file", "check_folders", "make_read_error", "read_small_file"]

_TEXTS = {".json", ".txt", ".jinja", ".md"}
# A tokenizer.json of a large vocabulary has 20 MB.
_MAX_TEXT_BYTES = 64 << 20
_MAX_FILES = 10_000


@dataclass(frozen=True)
class SourceFile:
    """A file of weights whose digest the manifest records, and its state before anything was loaded from it."""

    path: Path
    state: FileState

    @classmethod
    def of(cls, path: Path) -> SourceFile:
        """Note the state of a file.

        Raises:
            CheckpointError: it cannot be read.
        """
        try:
            return cls(path, FileState.of(os.stat(path)))
        except OSError as error:
            raise make_read_error(path, error) from error

    def hash(self) -> str:
        """Return the SHA-256 of the content that was loaded.

        Raises:
            CheckpointError: the file has changed since its state was noted, or cannot be read.
        """
        try:
            with open_regular(self.path) as stream:
                sha256, _ = hash_stream(stream)
                state = FileState.of(os.fstat(stream.fileno()))
        except OSError as error:
            raise make_read_error(self.path, error) from error
        if state != self.state:
            raise CheckpointError(
                f"{self.path} was changed, moved or linked while it was exported, expected it to stay as it is; export "
                "again, and stop the program that writes there"
            )
        return sha256


def check_folders(checkpoint: Path, *folders: str) -> None:
    """Check every file in these folders of a checkpoint, as far as they exist.

    Args:
        checkpoint: the checkpoint's folder. Links on the way to it are the user's own, and followed.
        folders: names in it; "." for the folder itself.

    Raises:
        CheckpointError: a file is a link that leads out of the checkpoint, is a pipe, a device or a socket, or is too
            large; or a folder has too many files.
    """
    root = find_root(checkpoint)
    for name in folders:
        folder = checkpoint / name
        if os.path.lexists(folder):
            _check_entry(folder, root)
            for count, path in enumerate(_walk(folder)):
                if count == _MAX_FILES:
                    raise CheckpointError(f"{folder} has more than {_MAX_FILES:,} files, expected a component's few")
                _check_entry(path, root)


def check_file(checkpoint: Path, path: Path) -> None:
    """Check one file of a checkpoint, as `check_folders` does."""
    _check_entry(path, find_root(checkpoint))


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a file that must be small.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
        CheckpointError: it is larger than `max_bytes`.
    """
    with open_regular(path) as stream:
        data = read_at_most(stream, max_bytes)
    if len(data) > max_bytes:
        raise CheckpointError(
            f"{path} has {os.stat(path).st_size:,} bytes, expected at most {max_bytes:,}; the checkpoint is "
            "damaged, download it again"
        )
    return data


def make_read_error(path: Path, error: OSError) -> CheckpointError:
    """Make the error of a file that the system does not let us read."""
    return CheckpointError(f"{path} cannot be read: {error.strerror}; download the checkpoint again")


def _walk(folder: Path) -> Iterator[Path]:
    """Yield everything in a folder, and in the folders that are in it. Links are yielded and not entered."""
    for parent, folders, files in os.walk(os.path.realpath(folder)):
        yield from (Path(parent, name) for name in sorted([*folders, *files]))


def _check_entry(path: Path, root: Path) -> None:
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(root):
        raise CheckpointError(
            f"{path} is a link that leads to {real}, expected it to stay inside {root}; if the checkpoint is your own, "
            "put the file itself there"
        )
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return  # a dangling link, left by an interrupted download; reported by whoever needs the file
    except OSError as error:
        raise make_read_error(path, error) from error
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise CheckpointError(f"{path} is a pipe, a device or a socket, expected a file; remove it")
    if path.suffix.lower() in _TEXTS and found.st_size > _MAX_TEXT_BYTES:
        raise CheckpointError(
            f"{path} has {found.st_size:,} bytes, expected at most {_MAX_TEXT_BYTES:,}; the checkpoint is damaged, "
            "download it again"
        )

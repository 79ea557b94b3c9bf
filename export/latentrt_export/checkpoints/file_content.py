"""Identifies the content of a weights file by its first bytes, whatever its name, and explains other content.

A file that was downloaded wrongly often is a web page or a pointer of Git LFS; a renamed file is a pickle called
`.safetensors`, or safetensors called `.ckpt`. No pickle is opened.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from latentrt.bundle.digests import open_regular
from latentrt.errors import CheckpointError

__all__ = ["PICKLE_SUFFIXES", "FileContent", "PickleError", "explain_content", "find_content", "make_pickle_error"]

FileContent = Literal["safetensors", "pickle", "git-lfs", "html", "empty", "gguf", "unknown"]

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
_HEAD_BYTES = 512
# Protocol 0, and the first of the others: a class or function by name, or a mark.
_OLD_PICKLE = re.compile(rb"\(?(c[\w.]+\n\w+\n|\(?[dl]p\d+\n)")
_EXPLANATIONS: dict[FileContent, str] = {
    "git-lfs": "is a pointer of Git LFS, not the weights; fetch them with: git lfs pull",
    "html": "is a web page, not weights, as a download without permission leaves; download it again",
    "empty": "is empty; download it again",
    "gguf": "is GGUF, expected safetensors; use the checkpoint's safetensors",
}


class PickleError(CheckpointError):
    """A pickle would have to be opened; the message has a command that converts it."""


def find_content(path: Path) -> FileContent:
    """Identify a file by its first bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with open_regular(path) as stream:
        head = stream.read(_HEAD_BYTES)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return "empty"
    if head.startswith(b"version https://git-lfs"):
        return "git-lfs"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "html"
    if head.startswith(b"GGUF"):
        return "gguf"
    # The length of the header, little-endian, and the header, a JSON object. The first byte may be a pickle's.
    if head[8:9] == b"{" and not any(head[6:8]):
        return "safetensors"
    # torch.save writes a zip archive with a pickle, and did write bare pickles.
    if head.startswith(b"PK\x03\x04") or (head[0] == 0x80 and head[1:2] and head[1] <= 5) or _OLD_PICKLE.match(head):
        return "pickle"
    return "unknown"


def explain_content(path: Path) -> str | None:
    """Return the reason why a file is not safetensors, as the predicate of a sentence with the remedy.

    Returns:
        None if it is safetensors, or if its first bytes are of no known kind.

    Raises:
        OSError: the file cannot be read.
    """
    content = find_content(path)
    if content == "pickle":
        return f"is a pickle in spite of its name; {_advise([path], path.with_stem(f'{path.stem}-converted'))}"
    return _EXPLANATIONS.get(content)


def make_pickle_error(old: Sequence[Path], new: Path, reason: str = "and there are no safetensors") -> PickleError:
    """Return the error for pickles that would have to be opened, with a command that converts them.

    Args:
        old: the pickle, or its shards.
        new: the safetensors file that the command writes.
        reason: why it would have to be opened.
    """
    return PickleError(f"{old[0]} is a pickle {reason}; {_advise(old, new)}")


def _advise(old: Sequence[Path], new: Path) -> str:
    paths = [str(path) for path in old]
    code = f"from latentrt_export.checkpoints.pickles import convert; convert({paths!r}, {str(new)!r})"
    return (
        "a pickle can run any code when it is opened, and is never opened here. Convert it with this command, which "
        f"runs none:\n  python -c {shlex.quote(code)}"
    )

"""What does CLIP's tokenizer know?

A single-file checkpoint carries no tokenizer: all of Stable Diffusion 1.x and 2.x use OpenAI CLIP's, whose merges
ship with this package (NOTICE says where they come from). The vocabulary follows from them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

__all__ = ["BEGIN", "END", "merges", "vocabulary", "write_vocabulary"]

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def write_vocabulary(folder: Path, merges: Sequence[str]) -> None:
    """Write `vocab.json` and `merges.txt`, as published checkpoints have them."""
    ids = {token: index for index, token in enumerate(vocabulary(merges))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def vocabulary(merges: Sequence[str]) -> list[str]:
    """The tokens in the order of their ids (49,408 for CLIP's own merges): letters, letters that end a word, merges,
    begin, end."""
    letters = _letters()
    ends = [f"{letter}</w>" for letter in letters]
    return [*letters, *ends, *(merge.replace(" ", "") for merge in merges), BEGIN, END]


def merges() -> list[str]:
    """The 48,894 merges, most frequent first, each as two tokens with a space between."""
    packed = files("latentrt_export.checkpoints").joinpath("configs", "clip", "merges.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8").splitlines()


def _letters() -> list[str]:
    """One printable letter for each byte, in the order of their ids (`bytes_to_unicode` in CLIP's simple_tokenizer.py).

    Printable bytes of Latin-1 stand for themselves and come first; the others borrow the letters from U+0100 on.
    """
    spans = ("!", "~"), ("¡", "¬"), ("®", "ÿ")
    printable = [chr(code) for first, last in spans for code in range(ord(first), ord(last) + 1)]
    return [*printable, *(chr(256 + index) for index in range(256 - len(printable)))]

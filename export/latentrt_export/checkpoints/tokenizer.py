"""CLIP's tokenizer: exports a checkpoint's tokenizer, and writes the one that single files lack.

A single-file checkpoint has no tokenizer. Stable Diffusion 1.x and 2.x all use OpenAI CLIP's, whose merges ship with
this package (NOTICE names their source). The vocabulary is computed from the merges.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from transformers import CLIPTokenizer

from latentrt.bundle.manifest import TokenizerRecord
from latentrt.errors import CheckpointError
from latentrt.text.tokenizer_json import read_tokenizer_json

__all__ = ["BEGIN", "END", "build_vocabulary", "export_tokenizer", "read_merges", "write_vocabulary"]

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
FILE = "tokenizer/tokenizer.json"


def export_tokenizer(checkpoint: Path, bundle: Path) -> TokenizerRecord:
    """Write a checkpoint's tokenizer, without padding and truncation: the runtime builds the chunks.

    Args:
        checkpoint: a diffusers folder; its tokenizer is `tokenizer.json`, or `vocab.json` with `merges.txt`.
        bundle: the folder of the new bundle.

    Raises:
        CheckpointError: the tokenizer is missing or cannot be read.
    """
    folder = checkpoint / "tokenizer"
    has_files = (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )
    if not has_files:
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; download the checkpoint again"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers package raises bare exceptions for a damaged file
        raise CheckpointError(f"{folder} cannot be read as a CLIP tokenizer: {error}") from error
    length = tokenizer.model_max_length
    if not 3 <= length <= 1024:
        raise CheckpointError(f"{folder} has model_max_length {length}, expected 77, as CLIP has")
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    (bundle / FILE).parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(bundle / FILE))
    try:
        read_tokenizer_json((bundle / FILE).read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a CLIP tokenizer: {error}") from error
    return TokenizerRecord(
        file=FILE,
        begin=tokenizer.bos_token_id,
        end=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        length=length,
    )


def write_vocabulary(folder: Path, merges: Sequence[str]) -> None:
    """Write `vocab.json` and `merges.txt` in the form of published checkpoints."""
    ids = {token: index for index, token in enumerate(build_vocabulary(merges))}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def build_vocabulary(merges: Sequence[str]) -> list[str]:
    """Build the tokens in the order of their ids: letters, letters that end a word, merges, begin, end.

    There are 49,408 for CLIP's own merges.
    """
    letters = _byte_letters()
    ends = [f"{letter}</w>" for letter in letters]
    return [*letters, *ends, *(merge.replace(" ", "") for merge in merges), BEGIN, END]


def read_merges() -> list[str]:
    """Read CLIP's 48,894 merges, most frequent first, each as two tokens with a space between."""
    packed = files("latentrt_export.checkpoints").joinpath("configs", "clip", "merges.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("utf-8").splitlines()


def _byte_letters() -> list[str]:
    """Return a printable letter for each byte, in the order of their ids (`bytes_to_unicode` in CLIP's
    simple_tokenizer.py).

    Printable bytes of Latin-1 are their own letters and come first; the others have the letters from U+0100 on.
    """
    spans = ("!", "~"), ("¡", "¬"), ("®", "ÿ")
    printable = [chr(code) for first, last in spans for code in range(ord(first), ord(last) + 1)]
    return [*printable, *(chr(256 + index) for index in range(256 - len(printable)))]

"""CLIP's tokenizer: exports a checkpoint's tokenizer, and writes the one that single files lack.

A single-file checkpoint has no tokenizer. Stable Diffusion 1.x, 2.x and XL all use OpenAI CLIP's, whose merges ship
with this package (NOTICE names their source). The vocabulary is computed from the merges.

transformers reads the files of a checkpoint, so that the ids are those of diffusers. It runs on a copy of the files
that were read and checked here, because the tokenizers package hangs, panics or takes gigabytes for other content.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from latentrt.bundle.manifest import TokenizerRecord
from latentrt.bundle.printable import counted, printable, quote
from latentrt.errors import BundleError, CheckpointError
from latentrt.text.byte_pairs import BytePairEncoder
from latentrt.text.tokenizer import Tokenizer
from latentrt.text.tokenizer_json import MAX_BYTES, read_tokenizer_json
from latentrt_export.checkpoints.checkpoint_files import make_read_error, read_small_file
from latentrt_export.checkpoints.component_config import read_component_config
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.checkpoints.tokenizer_settings import SETTINGS_FILES, read_tokenizer_settings

__all__ = [
    "BEGIN",
    "END",
    "TOKENIZER_FILES",
    "build_vocabulary",
    "export_tokenizer",
    "read_length",
    "read_merges",
    "write_vocabulary",
]

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# The classes that diffusers makes a tokenizer with, by their names in model_index.json and in tokenizer_config.json.
# `TokenizersBackend` is the name that transformers 5 writes for `PreTrainedTokenizerFast`.
_CLASSES: Mapping[str, type] = {
    "CLIPTokenizer": CLIPTokenizer,
    "CLIPTokenizerFast": CLIPTokenizer,
    "PreTrainedTokenizerFast": PreTrainedTokenizerFast,
    "TokenizersBackend": PreTrainedTokenizerFast,
}
# The files of tokens and merges that transformers reads.
_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
TOKENIZER_FILES = (*_FILES, *SETTINGS_FILES)
"""The files of a tokenizer that an export reads, each if it exists."""
# The settings that the runtime follows. transformers takes them from `tokenizer.json` as well.
_SETTINGS = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
# From this value on, model_max_length is missing: transformers writes 10³⁰ for none.
_NO_LENGTH = 10**20
# Defaults of transformers' CLIPTextConfig.
_ROWS, _POSITIONS = 49408, 77


def export_tokenizer(checkpoint: Path, name: str, encoder: str, bundle: Path, scratch: Path) -> TokenizerRecord:
    """Write a checkpoint's tokenizer, without padding and truncation: the runtime builds the chunks.

    Args:
        checkpoint: a diffusers folder.
        name: the tokenizer's folder in it, which has `tokenizer.json`, or `vocab.json` with `merges.txt`.
        encoder: the text encoder's folder in it.
        bundle: the folder of the new bundle.
        scratch: a folder for temporary files, which the caller removes.

    Raises:
        CheckpointError: the tokenizer is missing, damaged, not CLIP's, or does not suit the text encoder.
    """
    folder = checkpoint / name
    tokenizer_class = _find_class(checkpoint, name)
    length = read_length(checkpoint, name, encoder)
    rows = _read_size(checkpoint / encoder, "vocab_size", _ROWS)
    copy = Path(tempfile.mkdtemp(dir=scratch))
    _copy_checked(folder, copy, needs_json=tokenizer_class is PreTrainedTokenizerFast)
    with _translating_failures(folder):
        tokenizer = tokenizer_class.from_pretrained(copy, local_files_only=True)  # type: ignore[attr-defined]
        _check_settings(tokenizer, folder)
        backend = tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        frame = _find_frame(tokenizer, folder)
        data = backend.to_str(pretty=True).encode()
    file = f"{name}/tokenizer.json"
    record = TokenizerRecord(file=file, **frame, length=length, rows=rows)
    _check_rows(_read(folder, data), rows, checkpoint / encoder)
    (bundle / file).parent.mkdir(parents=True, exist_ok=True)
    (bundle / file).write_bytes(data)
    try:
        Tokenizer.from_json(data, record)
    except BundleError as error:
        raise CheckpointError(f"{folder} is not a CLIP tokenizer: {error}") from error
    return record


def read_length(checkpoint: Path, name: str = "tokenizer", encoder: str = "text_encoder") -> int:
    """Return the number of tokens of a chunk: the tokenizer's `model_max_length`, else the encoder's positions.

    A chunk may be shorter than the encoder has positions, as diffusers' pipeline pads to `model_max_length`.

    Raises:
        CheckpointError: `model_max_length` is larger than the number of positions, or is not a length.
    """
    positions = _read_size(checkpoint / encoder, "max_position_embeddings", _POSITIONS)
    place = checkpoint / name / "tokenizer_config.json"
    config = read_object(place) if place.exists() else {}
    length = config.get("model_max_length", config.get("max_len"))
    if length is None or (isinstance(length, (int, float)) and _NO_LENGTH <= length < math.inf):
        return positions
    if type(length) is not int or not 3 <= length <= positions:
        raise CheckpointError(
            f"{place} has model_max_length {length!r:.40}, and {encoder} has {positions} positions; expected 3 to "
            f"{positions}. If the tokenizer belongs to this encoder, set model_max_length to {positions} there"
        )
    return length


def _read_size(folder: Path, key: str, default: int) -> int:
    """Return a number of a text encoder's configuration."""
    size = read_component_config(folder, "CLIPTextModel").get(key, default)
    if type(size) is not int or size < 1:
        raise CheckpointError(f"{folder / 'config.json'} has {key} {size!r:.40}, expected a number such as {default}")
    return size


def _find_class(checkpoint: Path, name: str) -> type:
    """Return the class of a tokenizer, from `model_index.json` as in diffusers.

    Raises:
        CheckpointError: `model_index.json` or `tokenizer_config.json` names another class than those of CLIP's
            byte-pair encoding.
    """
    place = checkpoint / name / "tokenizer_config.json"
    own = read_object(place).get("tokenizer_class") if place.exists() else None
    index = checkpoint / "model_index.json"
    entry = read_object(index).get(name) if index.exists() else None
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    for source, found in ((index, named), (place, own)):
        if found is not None and found not in [*_CLASSES]:
            raise CheckpointError(
                f"{source} names the tokenizer class {printable(str(found)[:60])}, expected one of CLIP's byte-pair "
                f"encoding: {', '.join(_CLASSES)}. latentrt does not replace a tokenizer; this one is not supported"
            )
    return _CLASSES[named or own or "CLIPTokenizer"]


def _copy_checked(folder: Path, copy: Path, *, needs_json: bool) -> None:
    """Copy the files of a tokenizer that transformers reads, after checking their sizes and contents.

    Args:
        folder: the checkpoint's.
        copy: the folder of the copies.
        needs_json: whether the tokenizer's class reads `tokenizer.json` only.

    Raises:
        CheckpointError: a file is missing, too large, not JSON, or not that of a CLIP tokenizer.
    """
    found = {name: data for name in _FILES if (data := _read_file(folder / name)) is not None}
    if "tokenizer.json" not in found and (needs_json or not {"vocab.json", "merges.txt"} <= found.keys()):
        others = "" if needs_json else " nor vocab.json and merges.txt"
        raise CheckpointError(
            f"{folder} has {'no' if needs_json else 'neither'} tokenizer.json{others}; download the checkpoint again"
        )
    settings = read_tokenizer_settings(folder)
    for name, data in found.items():
        if name == "tokenizer.json":
            _read(folder, data)
        elif name == "vocab.json":
            _check_vocabulary(folder / name, data)
        (copy / name).write_bytes(data)
    for name, content in settings.files.items():
        (copy / name).write_text(json.dumps(content), encoding="utf-8")


def _check_vocabulary(path: Path, data: bytes) -> None:
    """Check that ids have no gap, since the tokenizers package allocates memory up to the largest.

    Raises:
        CheckpointError: the file is not a vocabulary.
    """
    try:
        ids = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}; the checkpoint is damaged, download it again") from error
    if not isinstance(ids, dict):
        raise CheckpointError(f"{path} holds a {type(ids).__name__}, expected tokens and their ids")
    for token, index in ids.items():
        if type(index) is not int or not 0 <= index < len(ids):
            raise CheckpointError(
                f"{path} has the id {index!r:.40} of '{printable(token[:60])}', expected 0 to {len(ids) - 1}: it has "
                f"{counted(len(ids), 'token')}"
            )


def _read_file(path: Path) -> bytes | None:
    """Return the bytes of a file; None where there is none."""
    try:
        return read_small_file(path, MAX_BYTES) if path.is_file() else None
    except OSError as error:
        raise make_read_error(path, error) from error


def _read(folder: Path, data: bytes) -> BytePairEncoder:
    try:
        return read_tokenizer_json(data, framed=True)
    except ValueError as error:
        raise CheckpointError(f"{folder} is not a CLIP tokenizer: {error}") from None


@contextlib.contextmanager
def _translating_failures(folder: Path) -> Iterator[None]:
    """Raise each failure of transformers and the tokenizers package as an error of the checkpoint.

    Raises:
        CheckpointError: the two fail, by whatever exception.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # the tokenizers package raises bare exceptions for a damaged file
        raise CheckpointError(f"{folder} cannot be read as a CLIP tokenizer: {printable(str(error))}") from error
    except BaseException as error:
        # A panic in Rust is no Exception, and its class can be named by its name only.
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{folder} cannot be read as a CLIP tokenizer: {printable(str(error))}") from None


def _check_settings(tokenizer: Any, folder: Path) -> None:
    """Check the settings of a loaded tokenizer, some of which transformers takes from `tokenizer.json`.

    Raises:
        CheckpointError: one is not supported.
    """
    for name, expected in _SETTINGS.items():
        found = getattr(tokenizer, name)
        if found != expected:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} has {name} {quote(found)}, expected {expected!r}; set {name} in "
                "tokenizer_config.json"
            )


def _find_frame(tokenizer: Any, folder: Path) -> dict[str, int]:
    """Return the ids that frame a chunk.

    Raises:
        CheckpointError: the tokenizer has no such id, or frames a text otherwise than begin, text, end.
    """
    ids = {"begin": tokenizer.bos_token_id, "end": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for name, index in ids.items():
        if index is None:
            raise CheckpointError(f"{folder} has no {name} token, expected one, as CLIP has")
    framed = list(tokenizer("").input_ids)
    if framed != [ids["begin"], ids["end"]]:
        raise CheckpointError(
            f"{folder} frames a text as {framed[:9]}, expected {[ids['begin'], ids['end']]}: begin, the text, end"
        )
    return ids


def _check_rows(encoder: BytePairEncoder, rows: int, folder: Path) -> None:
    """Check that every id has a row in the text encoder's embedding.

    Raises:
        CheckpointError: some have none; the message names the tokens.
    """
    tokens = sorted((token for token, index in encoder.ids.items() if index >= rows), key=encoder.ids.__getitem__)
    if tokens:
        named = ", ".join(printable(token) for token in tokens[:5]) + (" …" if len(tokens) > 5 else "")
        raise CheckpointError(
            f"{folder} has {rows:,} rows, and the tokenizer {counted(len(tokens), 'token')} without a row: {named}; "
            "add the rows (resize_token_embeddings), or remove the tokens from the tokenizer"
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

"""The checkpoint's tokenizer, in whichever form it lies there → `tokenizer.json` and the ids that frame a chunk."""

from __future__ import annotations

from pathlib import Path

from transformers import CLIPTokenizer

from latentrt.bundle.manifest import TokenizerRecord
from latentrt.errors import CheckpointError

__all__ = ["export_tokenizer"]

FILE = "tokenizer/tokenizer.json"


def export_tokenizer(checkpoint: Path, bundle: Path) -> TokenizerRecord:
    """Write a tokenizer that the `tokenizers` package reads, without padding and truncation: the runtime frames chunks.

    Args:
        checkpoint: a diffusers folder; its tokenizer is `tokenizer.json`, or `vocab.json` with `merges.txt`.
        bundle: the folder of the bundle that is being made.

    Raises:
        CheckpointError: the tokenizer is missing or cannot be read.
    """
    folder = checkpoint / "tokenizer"
    has_files = (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )
    if not has_files:
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor vocab.json and merges.txt; get the checkpoint again"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers package raises bare exceptions for a damaged file
        raise CheckpointError(f"{folder} cannot be read as a CLIP tokenizer: {error}") from error
    length = tokenizer.model_max_length
    if not 3 <= length <= 1024:
        raise CheckpointError(f"{folder} says model_max_length {length}; expected 77, as CLIP has")
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    (bundle / FILE).parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(bundle / FILE))
    return TokenizerRecord(
        file=FILE,
        begin=tokenizer.bos_token_id,
        end=tokenizer.eos_token_id,
        pad=tokenizer.pad_token_id,
        length=length,
    )

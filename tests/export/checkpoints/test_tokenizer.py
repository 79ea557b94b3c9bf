"""The shipped vocabulary with the shipped tokenizer settings, against well-known ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from latentrt_export.checkpoints.single_file import CONFIGS
from latentrt_export.checkpoints.tokenizer import build_vocabulary, read_merges, write_vocabulary


def test_the_vocabulary_is_clips() -> None:
    tokens = build_vocabulary(read_merges())
    assert (len(read_merges()), len(tokens), len(set(tokens))) == (48894, 49408, 49408)
    assert (tokens[0], tokens[255], tokens[256], tokens[320]) == ("!", "\u0143", "!</w>", "a</w>")
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]


@pytest.mark.parametrize(("family", "pad"), [("stable-diffusion-1", 49407), ("stable-diffusion-2", 0)])
def test_the_tokenizer_is_the_published_one(family: str, pad: int, tmp_path: Path) -> None:
    folder = shutil.copytree(CONFIGS / family / "tokenizer", tmp_path / "tokenizer")
    write_vocabulary(folder, read_merges())
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    astronaut = tokenizer("An astronaut riding a horse, 8k").input_ids
    assert astronaut == [49406, 550, 18376, 6765, 320, 4558, 267, 279, 330, 49407]
    assert tokenizer("cat", padding="max_length", max_length=5).input_ids == [49406, 2368, 49407, pad, pad]
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8"))["<|endoftext|>"] == 49407

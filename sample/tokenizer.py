"""The tokenizer of the sample model.

A CLIP tokenizer whose merges are learned from the captions' own words, until each is one token; other words are
encoded byte by byte, as in CLIP.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from latentrt_export.checkpoints.tokenizer import BEGIN, END, write_vocabulary
from sample.captions import WORDS

__all__ = ["LENGTH", "write_tokenizer"]

LENGTH = 77

CONFIG: dict[str, Any] = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": LENGTH,
    "bos_token": BEGIN,
    "eos_token": END,
    "unk_token": END,
    "pad_token": END,
    "do_lower_case": True,
    "errors": "replace",
    "add_prefix_space": False,
}


def write_tokenizer(folder: Path) -> None:
    """Write `vocab.json`, `merges.txt` and both configurations into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_vocabulary(folder, _learn_merges())
    special = {key: value for key, value in CONFIG.items() if key.endswith("_token")}
    for name, value in (("tokenizer_config.json", CONFIG), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")


def _learn_merges() -> list[str]:
    """Merge the most frequent neighbours (of several, the first in the alphabet) until every word is one token.

    The tokenizers package learns the same merges, but orders equally frequent ones at random, and with them the ids.
    """
    words = [[*word[:-1], word[-1] + "</w>"] for word in sorted(WORDS)]
    merges = []
    while any(len(word) > 1 for word in words):
        counts = Counter(pair for word in words for pair in pairwise(word))
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(" ".join(pair))
        words = [_merge(word, pair) for word in words]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    parts: list[str] = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return parts

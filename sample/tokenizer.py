"""Which words does the sample model know whole?

A CLIP tokenizer whose merges are learned from the captions' own words, until each is one token; anything else is
spelled in bytes, as CLIP does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from latentrt_export.clip_vocabulary import BEGIN, END, write_vocabulary
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
    from tokenizers import Tokenizer, models, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(sorted(WORDS), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [" ".join(pair) for pair in merges]

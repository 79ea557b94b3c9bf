"""The shipped vocabulary with the shipped tokenizer settings, against well-known ids; tokenizers of checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from latentrt.bundle.manifest import TokenizerRecord
from latentrt.errors import CheckpointError
from latentrt.text.tokenizer import Tokenizer
from latentrt_export.checkpoints.single_file import CONFIGS
from latentrt_export.checkpoints.tokenizer import build_vocabulary, export_tokenizer, read_merges, write_vocabulary
from tests.tiny import write_tokenizer


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


# Tokenizers of checkpoints


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The files of a checkpoint that an export of its tokenizer reads."""
    folder = tmp_path / "checkpoint"
    ids = write_tokenizer(folder / "tokenizer", "sd1", "bpe")
    change(folder / "text_encoder" / "config.json", vocab_size=len(ids), max_position_embeddings=77)
    change(folder / "model_index.json", tokenizer=["transformers", "CLIPTokenizer"])
    return folder


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; `...` removes one."""
    path.parent.mkdir(exist_ok=True, parents=True)
    found = json.loads(path.read_text()) if path.exists() else {}
    kept = {key: value for key, value in {**found, **values}.items() if value is not ...}
    path.write_text(json.dumps(kept))


def export(checkpoint: Path) -> TokenizerRecord:
    return export_tokenizer(checkpoint, "tokenizer", "text_encoder", checkpoint)


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        export_tokenizer(checkpoint, "tokenizer", "text_encoder", checkpoint / "bundle")
    return str(caught.value)


def add_words(checkpoint: Path, *words: str) -> CLIPTokenizer:
    tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer")
    tokenizer.add_tokens([*words])
    shutil.rmtree(checkpoint / "tokenizer")
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    return tokenizer


def test_the_record_of_a_tokenizer(checkpoint: Path) -> None:
    record = export(checkpoint)
    assert (record.begin, record.end, record.pad, record.length, record.rows) == (558, 559, 559, 77, 560)


def test_a_word_without_a_row_is_refused_by_name(checkpoint: Path) -> None:
    add_words(checkpoint, "<cat>", "<\x1bdog>")
    message = refusal(checkpoint)
    assert "<cat>, <\\x1bdog>" in message
    assert "560 rows" in message
    change(checkpoint / "text_encoder" / "config.json", vocab_size=562)
    assert export(checkpoint).rows == 562


@pytest.mark.parametrize(("length", "expected"), [(76, 76), (3, 3), (..., 77), (int(1e30), 77), (1e30, 77)])
def test_a_shorter_chunk_is_followed_and_a_missing_length_is_the_encoders(
    checkpoint: Path, length: Any, expected: int
) -> None:
    change(checkpoint / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    assert export(checkpoint).length == expected


@pytest.mark.parametrize("length", [78, 248, 2, 0, -1, 77.0, "77", True, float("inf"), [77], 10**19])
def test_another_length_is_refused_with_both_values(checkpoint: Path, length: Any) -> None:
    change(checkpoint / "tokenizer" / "tokenizer_config.json", model_max_length=length)
    message = refusal(checkpoint)
    assert f"model_max_length {length!r}" in message
    assert "77 positions" in message


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "many"])
@pytest.mark.parametrize("key", ["vocab_size", "max_position_embeddings"])
def test_a_text_encoder_of_no_size(checkpoint: Path, key: str, value: Any) -> None:
    change(checkpoint / "text_encoder" / "config.json", **{key: value})
    assert f"{key} {value!r}" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["BertTokenizer", "XLMRobertaTokenizer", "T5TokenizerFast", "Mine", ["CLIPTokenizer"]])
@pytest.mark.parametrize("place", ["model_index.json", "tokenizer/tokenizer_config.json"])
def test_another_class_is_refused_by_its_name(checkpoint: Path, place: str, name: Any) -> None:
    own = "config" in place
    change(checkpoint / place, **({"tokenizer_class": name} if own else {"tokenizer": ["transformers", name]}))
    message = refusal(checkpoint)
    assert str(name) in message
    assert place in message


def test_another_class_is_refused_before_its_files_are_read(checkpoint: Path) -> None:
    change(checkpoint / "model_index.json", tokenizer=["transformers", "T5Tokenizer"])
    shutil.rmtree(checkpoint / "tokenizer")
    assert "T5Tokenizer" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["CLIPTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"])
def test_classes_over_clips_byte_pairs_give_transformers_ids(checkpoint: Path, name: str) -> None:
    theirs = add_words(checkpoint, "<cat>", "<cat>_1")
    if name != "CLIPTokenizerFast":
        theirs = PreTrainedTokenizerFast.from_pretrained(checkpoint / "tokenizer")
        theirs.save_pretrained(checkpoint / "tokenizer")
    change(checkpoint / "model_index.json", tokenizer=["transformers", name])
    change(checkpoint / "text_encoder" / "config.json", vocab_size=562)
    record = export(checkpoint)
    ours = Tokenizer.from_json((checkpoint / record.file).read_bytes(), record)
    for text in ("", "It's a RED circle <cat>_1", "<|endoftext|>!! 猫 <CAT>"):
        expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.chunks(text)[0].tolist() == expected


def test_a_fast_tokenizer_without_begin_and_end_is_refused(checkpoint: Path) -> None:
    add_words(checkpoint)
    change(checkpoint / "tokenizer" / "tokenizer.json", post_processor=None)
    change(checkpoint / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    assert "frames a text as []" in refusal(checkpoint)


def test_a_fast_tokenizer_of_a_word_list_is_refused_by_its_model(checkpoint: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, unk_token="<s>"))
    shutil.rmtree(checkpoint / "tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<s>").save_pretrained(checkpoint / "tokenizer")
    change(checkpoint / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    assert "WordLevel" in refusal(checkpoint)


def test_a_fast_tokenizer_without_its_file(checkpoint: Path) -> None:
    change(checkpoint / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    assert "has no tokenizer.json" in refusal(checkpoint)


def test_padding_of_an_earlier_call_is_not_exported(checkpoint: Path) -> None:
    """transformers saves the padding and truncation of a tokenizer's last call with it."""
    tokenizer = add_words(checkpoint)
    tokenizer("a star", padding="max_length", max_length=77, truncation=True)
    tokenizer.save_pretrained(checkpoint / "tokenizer")
    place = checkpoint / "tokenizer" / "tokenizer.json"
    assert json.loads(place.read_text())["padding"]["strategy"] == {"Fixed": 77}
    export(checkpoint)
    assert json.loads(place.read_text())["padding"] is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": ""}}, "Replace"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "Precompiled"),
        ({"pre_tokenizer": {"type": "Metaspace", "replacement": "_"}}, "Metaspace"),
        ({"model": {"type": "Unigram", "vocab": []}}, "Unigram"),
    ],
)
def test_no_library_sees_another_tokenizers_file(
    checkpoint: Path, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_words(checkpoint)
    change(checkpoint / "tokenizer" / "tokenizer.json", **changes)
    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", lambda *args, **kwargs: pytest.fail("it was read"))
    assert reason in refusal(checkpoint)


@pytest.mark.parametrize("name", ["vocab.json", "special_tokens_map.json", "merges.txt"])
def test_a_file_that_is_too_large(checkpoint: Path, name: str) -> None:
    with (checkpoint / "tokenizer" / name).open("r+b") as file:
        file.truncate((8 << 20) + 1)
    assert f"{name} has" in refusal(checkpoint)


class PanicException(BaseException):
    """Named like the class that a panic in Rust has, which no module exports."""


def test_a_panic_is_an_error_of_the_checkpoint(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(folder: Path, *, local_files_only: bool) -> None:
        raise error

    monkeypatch.setattr(CLIPTokenizer, "from_pretrained", read)
    error: BaseException = PanicException("called unwrap on \x1b")
    assert "called unwrap on \\x1b" in refusal(checkpoint)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint)


@pytest.mark.parametrize("index", [10**9, -1, True, 1.0, "1", None])
def test_a_vocabulary_with_a_gap_is_refused_before_memory_is_taken(checkpoint: Path, index: Any) -> None:
    """The tokenizers package takes 17 s and gigabytes for the first one."""
    change(checkpoint / "tokenizer" / "vocab.json", word=index)
    assert f"id {index!r} of 'word'" in refusal(checkpoint)

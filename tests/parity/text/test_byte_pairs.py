"""Ids of texts compared with those of the tokenizers package, for CLIP's own vocabulary and for a tiny one."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from latentrt.bundle.sample import bundle_path
from latentrt.text.byte_pairs import BytePairEncoder
from latentrt.text.tokenizer_json import read_tokenizer_json
from latentrt_export.checkpoints.tokenizer import read_merges, write_vocabulary

CHARACTERS = "abcdefghij ABC '’s t re ll d 012 ½²Ⅷ .,!?-<|>é\u0301\u0308ñßΣςİǅ漢字かな한🦊\u200d\n\t\x1c\x85\xa0\u3000"
TEXTS = [
    "a photograph of an astronaut riding a horse on the moon, 35mm film",
    "It's John's CAR, don't!! 1234 ½ ² Ⅷ",
    "<|endoftext|> <|EndOfText|>!! ><|startoftext|>x<|STARTOFTEXT|>'s",
    "ΑΣ ΟΔΟΣ İstanbul ǅ ß ẞ",
    "e\u0301 \u1100\u1161\u11a8 日本語テスト🦊🏳️\u200d🌈",
    "a\x1cb\x85c\u2028d\u200be\ufefff\x00",
    "''s'''t 're'LL",
    " ",
    "",
]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The `tokenizer.json` of CLIP's 49,408 tokens, as the exporter writes it."""
    folder = tmp_path_factory.mktemp("clip")
    write_vocabulary(folder, read_merges())
    backend = CLIPTokenizer.from_pretrained(folder).backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.save(str(folder / "tokenizer.json"))
    return (folder / "tokenizer.json").read_bytes()


Pair = tuple[BytePairEncoder, tokenizers.Tokenizer]


@pytest.fixture(scope="module", params=["clip", "normalized", "sample"])
def pair(request: pytest.FixtureRequest, clip: bytes) -> Pair:
    """CLIP's file, that with special tokens found after normalisation, as the hub's copies say, and the sample's."""
    data = clip
    if request.param == "sample":
        data = (Path(bundle_path()) / "tokenizer" / "tokenizer.json").read_bytes()
    elif request.param == "normalized":
        data = clip.replace(b'"normalized": false', b'"normalized": true')
        assert data != clip
    return read_tokenizer_json(data), tokenizers.Tokenizer.from_buffer(data)


def assert_same(pair: Pair, text: str) -> None:
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


@pytest.mark.parametrize("text", TEXTS)
def test_texts(pair: Pair, text: str) -> None:
    assert_same(pair, text)


def test_texts_of_many_scripts(pair: Pair) -> None:
    rng = random.Random(0)
    for _ in range(5000):
        assert_same(pair, "".join(rng.choice(CHARACTERS) for _ in range(rng.randrange(40))))


@given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
@settings(max_examples=300, deadline=None)
def test_any_text(pair: Pair, text: str) -> None:
    assert_same(pair, text)


def test_every_character_between_letters(pair: Pair) -> None:
    """Of the basic plane, without those that Python's Unicode database does not know yet."""
    known = [chr(code) for code in range(0x10000) if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    assert len(known) > 60_000
    for start in range(0, len(known), 64):
        assert_same(pair, " ".join(f"a{character}b" for character in known[start : start + 64]))

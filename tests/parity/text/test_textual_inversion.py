"""Textual inversions of several vectors that were saved with a pipeline: ids compared with transformers' and diffusers'
`TextualInversionLoaderMixin`, which the pipelines of Stable Diffusion derive from."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTokenizer

from latentrt.bundle.manifest import TokenizerRecord
from latentrt.text.tokenizer import Tokenizer
from tests.tiny import write_tokenizer

# Of three, two and two vectors; of one vector; without the second vector.
WORDS = ("<cat>", "<cat>_1", "<cat>_2", "[Dog]", "[Dog]_1", "zebra", "zebra_1", "<one>", "<gap>", "<gap>_2")
TEXTS = (
    "a red <cat> on the blue background",
    "<cat>",
    "<cat><cat> <cat>",
    "<CAT> and <Cat> and <cat>",
    "<cat>_1",
    "<cat>_1 before <cat>, <cat>_2",
    "[dog] [Dog] [DOG]_1",
    "zebras, Zebra, zebra_1, azebra",
    "<one> <gap> <gap>_2 <gap>_1",
    "no inversion, <|endoftext|> <|startoftext|>",
    "",
)
PIECES = (*WORDS, "<CAT>", "red", " ", " ", "circle,", "_1", "_2", "猫", "'s", "<", ">", "<|endoftext|>")


@pytest.fixture(scope="module", params=["normalized", "special"])
def tokenizers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, CLIPTokenizer]:
    """Ours and theirs, with words found after normalisation, as diffusers adds them, and with words found before."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, "sd1", "bpe")
    theirs = CLIPTokenizer.from_pretrained(folder)
    theirs.add_tokens([*WORDS], special_tokens=request.param == "special")
    theirs.save_pretrained(folder)
    record = TokenizerRecord(
        file="tokenizer.json",
        begin=theirs.bos_token_id,
        end=theirs.eos_token_id,
        pad=theirs.pad_token_id,
        length=77,
        rows=len(theirs),
    )
    return Tokenizer.from_json((folder / "tokenizer.json").read_bytes(), record), theirs


def expected_chunk(tokenizer: CLIPTokenizer, converted: str) -> list[int]:
    ids: list[int] = tokenizer(converted, padding="max_length", max_length=77, truncation=True).input_ids
    return ids


@pytest.fixture(scope="module")
def assert_same(tokenizers: tuple[Tokenizer, CLIPTokenizer]) -> Callable[[list[str]], None]:
    ours, theirs = tokenizers

    def check(texts: list[str]) -> None:
        for text, converted in zip(
            texts, TextualInversionLoaderMixin().maybe_convert_prompt(texts, theirs), strict=True
        ):
            assert ours.expand(text, 10_000) == converted
            assert ours.chunks(text)[0, :76].tolist() == expected_chunk(theirs, converted)[:76], text

    return check


def test_prompts(assert_same: Callable[[list[str]], None]) -> None:
    assert_same([*TEXTS])


def test_random_prompts(assert_same: Callable[[list[str]], None]) -> None:
    rng = random.Random(0)
    assert_same(["".join(rng.choices(PIECES, k=rng.randrange(12))) for _ in range(300)])


def test_vectors_beyond_a_chunk_go_on_in_the_next(tokenizers: tuple[Tokenizer, CLIPTokenizer]) -> None:
    """diffusers cuts such a prompt off."""
    ours, theirs = tokenizers
    text = "red " * 74 + "<cat>"
    converted = TextualInversionLoaderMixin().maybe_convert_prompt(text, theirs)
    ids = theirs(converted, add_special_tokens=False).input_ids
    assert len(ids) == 77
    first, second = ours.chunks(text).tolist()
    assert first[1:76] + second[1:3] == ids

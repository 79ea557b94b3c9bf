"""Chunks of token ids."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from latentrt import Bundle
from latentrt.bundle.manifest import TokenizerRecord
from latentrt.bundle.sample import bundle_path
from latentrt.errors import BundleError, RequestError
from latentrt.text.byte_pairs import BytePairEncoder
from latentrt.text.tokenizer import Tokenizer, open_tokenizer
from latentrt.text.tokenizer_json import MAX_BYTES
from tests.runtime.small_bundle import enlarge

ROWS = 680  # of the sample bundle's text encoder


@pytest.fixture
def tokenizer(bundle: Bundle) -> Tokenizer:
    """The sample bundle's, with another id for padding than for the end, as Stable Diffusion 2 has."""
    record = bundle.manifest.tokenizers["text_encoder"]
    assert record.end != 0
    return Tokenizer.from_json(bundle.read(record.file, MAX_BYTES), msgspec.structs.replace(record, pad=0))


def test_a_chunk_is_begin_text_end_and_padding(tokenizer: Tokenizer) -> None:
    chunks = tokenizer.chunks("red circle")
    assert chunks.shape == (1, 77)
    assert chunks.dtype == np.int64
    frame = tokenizer.frame
    assert chunks[0, 0] == frame.begin
    assert not {frame.begin, frame.end, 0} & {*chunks[0, 1:3].tolist()}
    assert chunks[0, 3:].tolist() == [frame.end, *[0] * 73]


@pytest.mark.parametrize(("words", "chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_a_text_is_split_every_75_tokens(tokenizer: Tokenizer, words: int, chunks: int) -> None:
    ids = tokenizer.chunks(" ".join(["red"] * words))
    assert ids.shape == (chunks, 77)
    assert (ids[:, 0] == tokenizer.frame.begin).all()
    assert (ids == tokenizer.frame.end).sum() == chunks
    red = tokenizer.chunks("red")[0, 1]
    assert (ids == red).sum() == words


@pytest.mark.parametrize(
    ("text", "reason"),
    [("red \udfff circle", "U\\+DFFF"), ("\ud800", "U\\+D800"), ("a" + "\u0316\u0301" * 501, "1000 combining marks")],
)
def test_a_text_that_cannot_be_normalised_is_refused(tokenizer: Tokenizer, text: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        tokenizer.chunks(text)


def test_texts_with_marks_are_encoded(tokenizer: Tokenizer) -> None:
    assert tokenizer.chunks("e\u0301 " * 10).tolist() == tokenizer.chunks("\xe9 " * 10).tolist()
    tokenizer.chunks("a" + "\u0316\u0301" * 500, limit=256)


def test_padding_appends_empty_chunks(tokenizer: Tokenizer) -> None:
    chunks = tokenizer.chunks("red")
    padded = tokenizer.pad(chunks, 3)
    np.testing.assert_array_equal(padded[:1], chunks)
    np.testing.assert_array_equal(padded[1:], np.repeat(tokenizer.chunks(""), 2, axis=0))
    for count in (0, 1):
        np.testing.assert_array_equal(tokenizer.pad(chunks, count), chunks)


def test_a_file_that_is_not_a_tokenizer_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.from_json(b"{}", tokenizer.frame)


def test_a_file_too_large_to_be_a_tokenizer_is_not_read(tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_path(), tmp_path / "bundle")
    name = Bundle.open(copy).manifest.tokenizers["text_encoder"].file
    enlarge(copy, name, 1 << 40)
    with pytest.raises(BundleError, match=f"has 1,099,511,627,776 bytes, expected at most {MAX_BYTES:,}"):
        open_tokenizer(Bundle.open(copy), "text_encoder")


def test_every_id_has_a_row(bundle: Bundle) -> None:
    record = bundle.manifest.tokenizers["text_encoder"]
    data = bundle.read(record.file, MAX_BYTES)
    assert open_tokenizer(bundle, "text_encoder").frame.rows == ROWS
    with pytest.raises(BundleError, match=rf"id {ROWS - 1} for 'end', and the text encoder has {ROWS - 1} rows"):
        Tokenizer.from_json(data, msgspec.structs.replace(record, rows=ROWS - 1))
    for name in ("begin", "end", "pad"):
        with pytest.raises(BundleError, match=f"id {ROWS} for '{name}'"):
            Tokenizer.from_json(data, msgspec.structs.replace(record, **{name: ROWS}))


def test_a_word_without_a_row_is_named() -> None:
    with pytest.raises(BundleError, match="id 3 for '<cat>', and the text encoder has 3 rows"):
        inversions("<cat>", rows=3)


def test_no_id_without_a_row_leaves_the_tokenizer() -> None:
    """Even if an encoder that was checked gives another id later."""
    found = inversions("<cat>")
    found.frame = msgspec.structs.replace(found.frame, rows=3)
    assert found.chunks("a b").max() == 2
    with pytest.raises(BundleError, match="id 3"):
        found.chunks("a <cat>")


# Textual inversions. `tests/parity/text/test_textual_inversion.py` compares with diffusers.


def inversions(*words: str, rows: int = 100) -> Tokenizer:
    """A tokenizer of the letters a and b and of some added words, whose ids are 3, 4, …"""
    added = {word: index for index, word in enumerate(words, 3)}
    vocabulary = {"a</w>": 0, "b</w>": 1, "end": 2}
    encoder = BytePairEncoder(vocabulary, [], {}, normalized=added, unknown=2)
    return Tokenizer(encoder, TokenizerRecord(file="x.json", begin=2, end=2, pad=2, length=12, rows=rows))


def test_the_first_word_of_an_inversion_stands_for_all_its_vectors() -> None:
    tokenizer = inversions("<cat>", "<cat>_1", "<cat>_2", "<dog>", "<dog>_2", "<Eel>", "<Eel>_1")
    assert tokenizer.expand("a <cat> b", 99) == "a <cat> <cat>_1 <cat>_2 b"
    assert tokenizer.chunks("a <cat> b")[0].tolist() == [2, 0, 3, 4, 5, 1, *[2] * 6]
    assert tokenizer.expand("a <dog> <cat>_2", 99) == "a <dog> <cat>_2", "one vector, and not the first"
    assert tokenizer.expand("<CAT>", 99) == "<CAT>", "found, and spelled otherwise"
    assert tokenizer.expand("<Eel>", 99) == "<Eel>", "found as <eel>, which is no word"


def test_vectors_are_counted_before_they_are_written_out() -> None:
    tokenizer = inversions("<cat>", *(f"<cat>_{number}" for number in range(1, 50)), rows=1000)
    assert len(tokenizer.chunks("<cat>" * 3)) == 15
    with pytest.raises(RequestError, match="vectors"):
        tokenizer.chunks("<cat>" * 4)
    with pytest.raises(RequestError, match="vectors"):
        tokenizer.expand("<cat>" * 1000, 1000)


def test_inversions_of_inversions_do_not_multiply() -> None:
    """Each word is inside both vectors of the one before: twenty words, 2²⁰ vectors."""
    names = ["a" * length for length in range(20, 0, -1)]
    tokenizer = inversions(*names, *(f"{name}_1" for name in names))
    with pytest.raises(RequestError, match="vectors"):
        tokenizer.expand(" ".join(names), 1000)


def test_a_text_of_too_many_chunks_is_refused() -> None:
    tokenizer = inversions("<cat>")
    assert len(tokenizer.chunks("a " * 30, limit=3)) == 3
    with pytest.raises(RequestError, match="31 tokens, expected at most 30"):
        tokenizer.chunks("a " * 31, limit=3)

"""Chunks of token ids."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from latentrt import Bundle
from latentrt.errors import BundleError
from latentrt.text.tokenizer import Tokenizer


@pytest.fixture
def tokenizer(bundle: Bundle) -> Tokenizer:
    """The sample bundle's, with another id for padding than for the end, as Stable Diffusion 2 has."""
    record = bundle.manifest.tokenizers["text_encoder"]
    assert record.end != 0
    return Tokenizer.from_json(bundle.read(record.file), msgspec.structs.replace(record, pad=0))


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

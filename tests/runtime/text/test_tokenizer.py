"""Chunks of token ids. That the ids are transformers' is tested with a real vocabulary in `tests/test_parity.py`."""

from __future__ import annotations

import numpy as np
import pytest

from latentrt import Bundle
from latentrt.errors import BundleError
from latentrt.text.tokenizer import Tokenizer
from tests.exported import Exported


@pytest.fixture(scope="module")
def tokenizer(sd2: Exported) -> Tokenizer:
    bundle = Bundle.open(sd2.bundle)
    record = bundle.manifest.tokenizers["text_encoder"]
    return Tokenizer.from_json(bundle.read(record.file), record)


def test_a_chunk_is_begin_text_end_and_padding_with_id_zero(tokenizer: Tokenizer) -> None:
    chunks = tokenizer.chunks("red circle")
    assert chunks.shape == (1, 77)
    assert chunks.dtype == np.int64
    frame = tokenizer.frame
    assert chunks[0, 0] == frame.begin
    assert chunks[0, 3:].tolist() == [frame.end, *[0] * 73]


@pytest.mark.parametrize(("words", "chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_a_prompt_is_cut_every_75_tokens(tokenizer: Tokenizer, words: int, chunks: int) -> None:
    ids = tokenizer.chunks(" ".join(["red"] * words))
    assert ids.shape == (chunks, 77)
    assert (ids[:, 0] == tokenizer.frame.begin).all()
    red = tokenizer.chunks("red")[0, 1]
    assert (ids == red).sum() == words


def test_empty_chunks_fill_up(tokenizer: Tokenizer) -> None:
    ids = tokenizer.chunks("red", at_least=3)
    np.testing.assert_array_equal(ids[1:], np.repeat(tokenizer.chunks(""), 2, axis=0))


def test_what_is_not_a_tokenizer_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BundleError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.from_json(b"{}", tokenizer.frame)

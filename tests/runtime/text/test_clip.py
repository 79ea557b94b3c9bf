"""Text embeddings of prompts of any length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt import Bundle
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.session import Arrays, Session, run
from latentrt.errors import RequestError
from latentrt.text import clip
from latentrt.text.clip import PromptEncoder
from latentrt.text.tokenizer import Tokenizer, open_tokenizer

LONG = " ".join(["star"] * 100)  # two chunks


class Recording(Session):
    """A session that records its inputs."""

    def __init__(self, real: Session) -> None:
        self.inputs, self.outputs, self._real = real.inputs, real.outputs, real
        self.fed = list[Mapping[str, NDArray[Any]]]()

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        self.fed.append(feeds)
        return self._real.run(feeds)


@pytest.fixture
def session(bundle: Bundle) -> Recording:
    return Recording(open_session(bundle, "text_encoder", threads=1))


@pytest.fixture
def tokenizer(bundle: Bundle) -> Tokenizer:
    return open_tokenizer(bundle, "text_encoder")


@pytest.fixture
def encoder(tokenizer: Tokenizer, session: Recording) -> PromptEncoder:
    return PromptEncoder(tokenizer, lambda: session)


def encode_chunk(session: Session, ids: NDArray[np.int64], clip_skip: int = 0) -> NDArray[np.float32]:
    outputs = run(session, input_ids=ids[np.newaxis], clip_skip=np.array([clip_skip]))
    hidden: NDArray[np.float32] = outputs["hidden_states"][0]
    return hidden


def test_chunks_are_counted(encoder: PromptEncoder) -> None:
    assert [encoder.chunks(text) for text in ("", "a star", LONG)] == [1, 1, 2]
    assert encoder.chunk_tokens == 77


@pytest.mark.parametrize("clip_skip", [0, 2])
def test_chunks_are_encoded_by_themselves_and_joined(
    encoder: PromptEncoder, session: Recording, tokenizer: Tokenizer, clip_skip: int
) -> None:
    ((found, pooled),) = encoder.encode([LONG], 2, clip_skip)
    assert pooled is None, "the sample's encoder has no such output"
    assert found.shape == (154, 128)
    assert found.dtype == np.float32
    first, second = (encode_chunk(session, ids, clip_skip) for ids in tokenizer.chunks(LONG))
    np.testing.assert_allclose(found, np.concatenate([first, second]), rtol=0, atol=1e-5)
    assert session.fed[0]["clip_skip"].tolist() == [clip_skip] * 2


def test_skipping_layers_changes_the_embeddings(encoder: PromptEncoder) -> None:
    plain, skipped = (encoder.encode(["a star"], 1, clip_skip)[0].embeddings for clip_skip in (0, 1))
    assert np.abs(plain - skipped).max() > 0.1


def test_short_texts_are_filled_up_with_empty_chunks(
    encoder: PromptEncoder, session: Recording, tokenizer: Tokenizer
) -> None:
    short, long = (each.embeddings for each in encoder.encode(["a star", LONG], 2))
    assert short.shape == long.shape
    np.testing.assert_allclose(short[:77], encode_chunk(session, tokenizer.chunks("a star")[0]), rtol=0, atol=1e-5)
    np.testing.assert_allclose(short[77:], encode_chunk(session, tokenizer.chunks("")[0]), rtol=0, atol=1e-5)


def test_equal_texts_are_encoded_once_and_share_an_array(encoder: PromptEncoder, session: Recording) -> None:
    found = [each.embeddings for each in encoder.encode(["a star", "a circle", "a star"], 1)]
    assert found[0] is found[2]
    assert not np.array_equal(found[0], found[1])
    assert [len(feeds["input_ids"]) for feeds in session.fed] == [2]


def test_embeddings_cannot_be_written_to(encoder: PromptEncoder) -> None:
    (found,) = encoder.encode(["a star"], 1)
    assert not found.embeddings.flags.writeable


def test_a_text_is_tokenised_once(tokenizer: Tokenizer, session: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    chunks = tokenizer.chunks

    def counted(text: str, limit: int) -> NDArray[np.int64]:
        calls.append(text)
        return chunks(text, limit)

    monkeypatch.setattr(tokenizer, "chunks", counted)
    encoder = PromptEncoder(tokenizer, lambda: session)
    encoder.chunks(LONG)
    encoder.encode([LONG, LONG], encoder.chunks(LONG))
    encoder.encode([LONG], 3)
    assert calls == [LONG]


def test_more_chunks_than_the_limit_are_refused_before_the_encoder_runs(
    tokenizer: Tokenizer, session: Recording
) -> None:
    encoder = PromptEncoder(tokenizer, lambda: session, max_chunks=2)
    assert encoder.chunks(LONG) == 2
    with pytest.raises(RequestError, match="151 tokens, expected at most 150"):
        encoder.encode([" ".join(["star"] * 151)], 3)
    assert session.fed == []


def test_many_chunks_are_encoded_some_at_a_time(
    encoder: PromptEncoder, session: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encoder.encode([LONG, "a star"], 2)
    monkeypatch.setattr(clip, "_MAX_ROWS", 3)
    found = encoder.encode([LONG, "a star"], 2)
    assert [len(feeds["input_ids"]) for feeds in session.fed] == [4, 3, 1]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.embeddings, other.embeddings, rtol=0, atol=1e-5)  # of another batch size
        assert not one.embeddings.flags.writeable

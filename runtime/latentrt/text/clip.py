"""CLIP text embeddings: prompts of any length, in chunks of the encoder's length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, run
from latentrt.bundle.manifest import MAX_PROMPT_CHUNKS
from latentrt.text.tokenizer import Tokenizer

__all__ = ["EncodedText", "PromptEncoder", "join"]

Floats = NDArray[np.float32]
# Chunks that are encoded at once. One takes about 8 MB in CLIP ViT-L, the text encoder of Stable Diffusion 1.x.
_MAX_ROWS = 32


class EncodedText(NamedTuple):
    """A text's embeddings.

    Attributes:
        embeddings: of each token, float32 [chunks · length, width].
        pooled: of the first chunk as a whole, float32 [width], where the encoder has that output.
    """

    embeddings: Floats
    pooled: Floats | None = None


def join(texts: Sequence[EncodedText]) -> EncodedText:
    """Return a text's embeddings by several encoders as one, read-only: joined along the width, pooled by the last.

    Encoders without a pooled output are skipped.
    """
    if len(texts) == 1:
        return texts[0]
    embeddings = np.concatenate([each.embeddings for each in texts], axis=-1)
    embeddings.setflags(write=False)
    return EncodedText(embeddings, next((each.pooled for each in reversed(texts) if each.pooled is not None), None))


class PromptEncoder:
    """Encodes the prompts of one request. Each text is tokenised once.

    Args:
        tokenizer: splits a text into chunks.
        encoder: returns the session of a graph with inputs `input_ids` int64 [B, length] and, optionally, `clip_skip`
            int64 [B]; outputs `hidden_states` float32 [B, length, width] and, optionally, `pooled` float32 [B, width].
        max_chunks: the largest number of chunks of a text.
    """

    def __init__(
        self, tokenizer: Tokenizer, encoder: Callable[[], Session], max_chunks: int = MAX_PROMPT_CHUNKS
    ) -> None:
        self._tokenizer, self._encoder, self._max_chunks = tokenizer, encoder, max_chunks
        self._ids: dict[str, NDArray[np.int64]] = {}

    @property
    def chunk_tokens(self) -> int:
        """Number of tokens of a chunk, including begin and end."""
        return self._tokenizer.frame.length

    def chunks(self, text: str) -> int:
        """Return the number of chunks of a text.

        Raises:
            RequestError: there are more than `max_chunks`. The message does not name the text's argument.
        """
        return len(self._tokenize(text))

    def encode(self, texts: Sequence[str], chunks: int, clip_skip: int = 0) -> list[EncodedText]:
        """Return the embeddings of each text, read-only.

        Each chunk is encoded on its own, and the results are concatenated along the tokens. Texts with fewer chunks are
        padded with empty ones.

        Args:
            texts: equal texts are encoded once and share an array.
            chunks: number of chunks, at least that of the longest text.
            clip_skip: number of the encoder's last layers to skip; ignored by a graph without that input.
        """
        distinct = list(dict.fromkeys(texts))
        ids = np.concatenate([self._tokenizer.pad(self._tokenize(text), chunks) for text in distinct])
        encoder = self._encoder()
        feeds: Arrays = {"input_ids": ids, "clip_skip": np.full(len(ids), clip_skip, np.int64)}
        given = {spec.name: feeds[spec.name] for spec in encoder.inputs}
        runs = [
            run(encoder, **{name: feed[start : start + _MAX_ROWS] for name, feed in given.items()})
            for start in range(0, len(ids), _MAX_ROWS)
        ]
        outputs = (
            runs[0] if len(runs) == 1 else {name: np.concatenate([each[name] for each in runs]) for name in runs[0]}
        )
        for output in outputs.values():
            output.setflags(write=False)
        states, pooled = outputs["hidden_states"], outputs.get("pooled")
        embeddings = states.reshape(len(distinct), chunks * self.chunk_tokens, states.shape[-1])
        by_text = {
            text: EncodedText(embeddings[index], None if pooled is None else pooled[index * chunks])
            for index, text in enumerate(distinct)
        }
        return [by_text[text] for text in texts]

    def _tokenize(self, text: str) -> NDArray[np.int64]:
        """Return the token ids of a text, int64 [chunks, length], tokenised at most once."""
        if text not in self._ids:
            self._ids[text] = self._tokenizer.chunks(text, self._max_chunks)
        return self._ids[text]

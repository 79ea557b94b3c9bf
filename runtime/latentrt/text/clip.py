"""CLIP text embeddings: prompts of any length, in chunks of the encoder's length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Session, run
from latentrt.text.tokenizer import Tokenizer

__all__ = ["PromptEncoder"]

Floats = NDArray[np.float32]


class PromptEncoder:
    """Encodes the prompts of one request. Each text is tokenised once.

    Args:
        tokenizer: splits a text into chunks.
        encoder: returns the session of a graph with inputs `input_ids` int64 [B, length] and `clip_skip` int64 [B], and
            output `hidden_states` float32 [B, length, width].
    """

    def __init__(self, tokenizer: Tokenizer, encoder: Callable[[], Session]) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder
        self._ids: dict[str, NDArray[np.int64]] = {}

    @property
    def chunk_tokens(self) -> int:
        """Number of tokens of a chunk, including begin and end."""
        return self._tokenizer.frame.length

    def chunks(self, text: str) -> int:
        """Return the number of chunks of a text."""
        return len(self._tokenize(text))

    def encode(self, texts: Sequence[str], chunks: int, clip_skip: int = 0) -> list[Floats]:
        """Return the embeddings of each text, float32 [chunks · length, width], read-only.

        Each chunk is encoded on its own, and the results are concatenated along the tokens. Texts with fewer chunks are
        padded with empty ones.

        Args:
            texts: equal texts are encoded once and share an array.
            chunks: number of chunks, at least that of the longest text.
            clip_skip: number of the encoder's last layers to skip.
        """
        distinct = list(dict.fromkeys(texts))
        ids = np.concatenate([self._tokenizer.pad(self._tokenize(text), chunks) for text in distinct])
        skips = np.full(len(ids), clip_skip, np.int64)
        states: Floats = run(self._encoder(), input_ids=ids, clip_skip=skips)["hidden_states"]
        encoded = states.reshape(len(distinct), chunks * self.chunk_tokens, states.shape[-1])
        by_text = dict(zip(distinct, encoded, strict=True))
        for embeddings in by_text.values():
            embeddings.setflags(write=False)
        return [by_text[text] for text in texts]

    def _tokenize(self, text: str) -> NDArray[np.int64]:
        """Return the token ids of a text, int64 [chunks, length], tokenised at most once."""
        if text not in self._ids:
            self._ids[text] = self._tokenizer.chunks(text)
        return self._ids[text]

"""The tokenizer: converts text to chunks of token ids."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import TokenizerRecord
from latentrt.errors import BundleError
from latentrt.text.byte_pairs import BytePairEncoder

__all__ = ["Tokenizer"]


class Tokenizer:
    """A bundle's tokenizer: byte-pair encoding, in chunks of the text encoder's length.

    Args:
        encoder: encodes a text of any length.
        frame: special ids and length of a chunk.
    """

    def __init__(self, encoder: BytePairEncoder, frame: TokenizerRecord) -> None:
        self._encoder, self.frame = encoder, frame

    @classmethod
    def from_json(cls, data: bytes, frame: TokenizerRecord) -> Self:
        """Read a tokenizer from the contents of its `tokenizer.json`.

        Raises:
            BundleError: the contents are not those of a CLIP tokenizer.
        """
        try:
            encoder = BytePairEncoder.from_json(data)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{frame.file} is not a CLIP tokenizer: {error}; export the bundle again") from error
        return cls(encoder, frame)

    def chunks(self, text: str) -> NDArray[np.int64]:
        """Return the token ids of a text of any length, int64 [chunks, length].

        The tokens are split into pieces of `length` − 2 (75 for CLIP), and each piece is framed as in the encoder's
        training: begin, tokens, end, padding. For a text of one chunk the ids are those of transformers'
        `CLIPTokenizer` with `padding="max_length"`.
        """
        ids = self._encoder.encode(text)
        room = self.frame.length - 2
        pieces = [ids[start : start + room] for start in range(0, max(len(ids), 1), room)]
        return np.array([self._frame(piece) for piece in pieces], np.int64)

    def pad(self, chunks: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Pad chunks, int64 [n, length], with empty ones to int64 [count, length]; more than `count` stay unchanged."""
        if len(chunks) >= count:
            return chunks
        empty = np.array([self._frame([])], np.int64)
        return np.concatenate([chunks, empty.repeat(count - len(chunks), axis=0)])

    def _frame(self, piece: list[int]) -> list[int]:
        """Return a chunk of `length` ids: begin, the piece, end, padding."""
        framed = [self.frame.begin, *piece, self.frame.end]
        return framed + [self.frame.pad] * (self.frame.length - len(framed))

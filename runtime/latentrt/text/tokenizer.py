"""The tokenizer: text to chunks of token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import TokenizerRecord
from latentrt.errors import BundleError

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer"]


class Tokenizer:
    """A bundle's tokenizer: byte pairs by the `tokenizers` package, framed in chunks of the encoder's length.

    Args:
        backend: must neither pad nor truncate.
        frame: ids and length of a chunk.
    """

    def __init__(self, backend: tokenizers.Tokenizer, frame: TokenizerRecord) -> None:
        self._backend, self.frame = backend, frame

    @classmethod
    def from_json(cls, data: bytes, frame: TokenizerRecord) -> Self:
        """Read `tokenizer.json`.

        Raises:
            BundleError: it is not a tokenizer.
        """
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises bare exceptions
            raise BundleError(f"{frame.file} is not a tokenizer: {error}; export the bundle again") from error
        backend.no_padding()
        backend.no_truncation()
        return cls(backend, frame)

    def chunks(self, text: str) -> NDArray[np.int64]:
        """Return the token ids of a text of any length, int64 [chunks, length].

        The tokens are split after every `length` − 2 (75 for CLIP), and each piece is framed as the encoder was trained
        to see one: begin, tokens, end, padding. A short text gives what transformers' `CLIPTokenizer` gives with
        `padding="max_length"`.
        """
        ids = self._backend.encode(text, add_special_tokens=False).ids
        room = self.frame.length - 2
        pieces = [ids[start : start + room] for start in range(0, max(len(ids), 1), room)]
        return np.array([self._frame(piece) for piece in pieces], np.int64)

    def pad(self, chunks: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Return chunks [n, length] followed by empty ones, int64 [count, length]."""
        if len(chunks) >= count:
            return chunks
        empty = np.array([self._frame([])], np.int64)
        return np.concatenate([chunks, empty.repeat(count - len(chunks), axis=0)])

    def _frame(self, piece: list[int]) -> list[int]:
        framed = [self.frame.begin, *piece, self.frame.end]
        return framed + [self.frame.pad] * (self.frame.length - len(framed))

"""The tokenizer: converts text to chunks of token ids."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import MAX_PROMPT_CHUNKS, TokenizerRecord
from latentrt.errors import BundleError, RequestError
from latentrt.text.byte_pairs import BytePairEncoder
from latentrt.text.tokenizer_json import MAX_BYTES, read_tokenizer_json

if TYPE_CHECKING:
    from latentrt.bundle.bundle import Bundle

__all__ = ["Tokenizer", "open_tokenizer"]

# A row of marks is sorted in a time that grows with the square of its length (NFC, `unicodedata.normalize`).
_MAX_MARKS = 1000


class Tokenizer:
    """A bundle's tokenizer: byte-pair encoding, in chunks of the text encoder's length.

    Args:
        encoder: encodes a text of any length.
        frame: special ids and length of a chunk, and the number of rows of the text encoder's embedding. Every id is
            smaller.

    Raises:
        BundleError: the encoder or the frame has an id without a row.
    """

    def __init__(self, encoder: BytePairEncoder, frame: TokenizerRecord) -> None:
        self._encoder, self.frame = encoder, frame
        self._vectors = _find_vectors(encoder)
        special = {"begin": frame.begin, "end": frame.end, "pad": frame.pad}
        for token, index in (*special.items(), *encoder.ids.items()):
            if index >= frame.rows:
                raise BundleError(
                    f"{frame.file} has the id {index} for {token!r}, and the text encoder has {frame.rows:,} rows; "
                    "expected a row for each id. Export the bundle again"
                )

    @classmethod
    def from_json(cls, data: bytes, frame: TokenizerRecord) -> Self:
        """Read a tokenizer from the contents of its `tokenizer.json`.

        Args:
            data: the contents.
            frame: as for the class.

        Raises:
            BundleError: the contents are not those of a CLIP tokenizer, or an id has no row.
        """
        try:
            encoder = read_tokenizer_json(data)
        except ValueError as error:
            raise BundleError(f"{frame.file} is not a CLIP tokenizer: {error}; export the bundle again") from error
        return cls(encoder, frame)

    def chunks(self, text: str, limit: int = MAX_PROMPT_CHUNKS) -> NDArray[np.int64]:
        """Return the token ids of a text of any length, int64 [chunks, length].

        The tokens are split into pieces of `length` − 2 (75 for CLIP), and each piece is framed as in the encoder's
        training: begin, tokens, end, padding. For a text of one chunk the ids are those of transformers'
        `CLIPTokenizer` with `padding="max_length"`.

        Args:
            text: the text. The first word of a textual inversion stands for all its vectors (`expand`).
            limit: the largest number of chunks.

        Raises:
            RequestError: the text has more chunks, half a character, or very many combining marks in a row. The message
                does not name the argument that the text is of.
        """
        _check_text(text)
        room = self.frame.length - 2
        ids = self._encoder.encode(self.expand(text, limit * room))
        if len(ids) > limit * room:
            raise _too_long(f"{len(ids):,} tokens", limit * room)
        pieces = [ids[start : start + room] for start in range(0, max(len(ids), 1), room)]
        chunks = np.array([self._frame(piece) for piece in pieces], np.int64)
        if chunks.max() >= self.frame.rows:
            raise BundleError(f"{self.frame.file} made the id {chunks.max()}, expected one of {self.frame.rows:,} rows")
        return chunks

    def expand(self, text: str, limit: int) -> str:
        """Write out the vectors of each textual inversion that a text names by its first one.

        An inversion of three vectors has the words `<cat>`, `<cat>_1` and `<cat>_2`: `a <cat>` becomes
        `a <cat> <cat>_1 <cat>_2`. Source: diffusers, `TextualInversionLoaderMixin.maybe_convert_prompt`, of which this
        keeps that a word is found in any case but replaced only as it is spelled, and replaced inside other words too.
        diffusers replaces different words in no certain order; here in that of the text.

        Args:
            text: the text.
            limit: the largest number of tokens of the result.

        Raises:
            RequestError: the vectors alone are more tokens.
        """
        if not self._vectors:
            return text
        added = 0
        for index in dict.fromkeys(self._encoder.encode(text)):
            words = self._vectors.get(index, ())
            if len(words) > 1:
                added += text.count(words[0]) * (len(words) - 1)
                if added > limit:
                    raise _too_long(f"more than {added:,} vectors of textual inversions", limit)
                text = text.replace(words[0], " ".join(words))
        return text

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


def open_tokenizer(bundle: Bundle, component: str) -> Tokenizer:
    """Read the tokenizer of a bundle's text encoder.

    Args:
        bundle: an open bundle.
        component: the text encoder's name.

    Raises:
        BundleError, IntegrityError: a file is missing or damaged, or an id has no row in the encoder's embedding.
    """
    record = bundle.manifest.tokenizers[component]
    return Tokenizer.from_json(bundle.read(record.file, MAX_BYTES), record)


def _find_vectors(encoder: BytePairEncoder) -> dict[int, list[str]]:
    """Return the words of each textual inversion of several vectors by the id of the first: `<cat>`, `<cat>_1`, …

    A word that is found in another spelling than its own, as `<Cat>` is found in the normalised text as `<cat>`, has no
    further vectors in diffusers.
    """
    found = {}
    for word, index in encoder.found_tokens.items():
        words = [word]
        while (following := f"{word}_{len(words)}") in encoder.added_tokens:
            words.append(following)
        if len(words) > 1 and word in encoder.added_tokens:
            found[index] = words
    return found


def _check_text(text: str) -> None:
    """Refuse a text that has no UTF-8, or that takes minutes to normalise."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"got a text with half a character, U+{ord(text[error.start]):04X}, expected whole ones; remove it"
        ) from None
    row = 0
    for character in text if len(text) > _MAX_MARKS and not text.isascii() else "":
        row = row + 1 if unicodedata.category(character).startswith("M") else 0
        if row > _MAX_MARKS:
            raise RequestError(f"got a text with more than {_MAX_MARKS} combining marks in a row; remove them")


def _too_long(got: str, limit: int) -> RequestError:
    return RequestError(f"got a text of {got}, expected at most {limit:,} tokens; shorten it")

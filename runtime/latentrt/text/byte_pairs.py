"""CLIP's byte-pair encoding (Radford et al. 2021; Sennrich et al. 2016), read from a `tokenizer.json`.

A text is normalised (NFC, lower case) and split into words, single digits and runs of other signs, without the white
space between them. Each piece is its UTF-8 bytes as printable letters, the last of which ends in `</w>`; then the pair
of neighbours that was merged first in training is merged, again and again.

Source: the tokenizers package, whose ids for the same file these are (`tests/parity/test_byte_pairs.py`), and OpenAI's
simple_tokenizer.py. That package installs the hub's client too, 34 MB in all, which a runtime does not need.
"""

from __future__ import annotations

import functools
import heapq
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import msgspec

__all__ = ["BytePairEncoder"]

_END_OF_WORD = "</w>"
# Unicode's White_Space, which differs from that of `str.isspace`.
_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# A run of letters, a digit, or a run of other signs, in the classes of `_classify`.
_RUN = re.compile("L+|N|P+")
_MAX_CACHED_WORDS = 10_000
# The parts of a `tokenizer.json` that this module implements.
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ],
}
_PATTERN = "|".join([*_CONTRACTIONS, r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+"])


class _AddedToken(msgspec.Struct, frozen=True):
    """A token that is found in the text before it is normalised."""

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


class _Model(msgspec.Struct, frozen=True):
    """Byte pairs: token → id, and the merges, most frequent first: `["a", "b"]`, or `"a b"` in older files."""

    type: str
    vocab: dict[str, int]
    merges: list[list[str] | str]
    unk_token: str | None = None
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _File(msgspec.Struct, frozen=True):
    """The content of a `tokenizer.json`, as far as it concerns text → ids."""

    model: _Model
    normalizer: Any
    pre_tokenizer: Any
    added_tokens: tuple[_AddedToken, ...] = ()


class BytePairEncoder:
    """An encoder of texts.

    Args:
        vocabulary: token → id.
        merges: pairs of tokens, those that are merged first at the front.
        added: tokens that are found in a text as they are, such as `<|endoftext|>`: token → id.
        unknown: the id of a byte that the vocabulary lacks; None drops it.
        separate: words that are split off from the signs around them even where they are not added tokens, in lower
            case: `<|EndOfText|>`.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        added: Mapping[str, int],
        unknown: int | None,
        separate: Iterable[str] = (),
    ) -> None:
        self._vocabulary, self._added, self._unknown = vocabulary, added, unknown
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        longest_first = sorted(added, key=len, reverse=True)
        self._added_pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if added else None
        self._fixed = re.compile("|".join(map(re.escape, [*separate, *_CONTRACTIONS])))
        self._words: dict[str, list[int]] = {}

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read the content of a `tokenizer.json`.

        Raises:
            ValueError: it is not the file of a CLIP tokenizer.
        """
        file = msgspec.json.decode(data, type=_File)
        separate = _check_splitting(file)
        model = file.model
        if model.type != "BPE" or model.end_of_word_suffix != _END_OF_WORD or model.continuing_subword_prefix:
            raise ValueError(f"got a {model.type} model, expected byte pairs whose words end in {_END_OF_WORD}")
        if model.dropout or model.fuse_unk or model.byte_fallback or model.ignore_merges:
            raise ValueError("got an option of byte pairs that CLIP's tokenizers do not have")
        merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model.merges]
        for pair in merges:
            if len(pair) != 2 or "".join(pair) not in model.vocab:
                raise ValueError(f"got the merge {pair!r}, expected two tokens that make a token of the vocabulary")
        unknown = None if model.unk_token is None else model.vocab.get(model.unk_token)
        added = {token.content: token.id for token in file.added_tokens}
        return cls(model.vocab, merges, added, unknown, separate)  # type: ignore[arg-type]  # pairs, as checked

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without those that frame it."""
        ids: list[int] = []
        for part in self._added_pattern.split(text) if self._added_pattern is not None else [text]:
            if part in self._added:
                ids.append(self._added[part])
                continue
            for word in self._split(_normalize(part)):
                ids += self._encode_word(word)
        return ids

    def _split(self, text: str) -> Iterator[str]:
        """Split a normalised text into words, digits and runs of other signs."""
        classes, start = "".join(map(_classify, text)), 0
        while start < len(text):
            fixed = self._fixed.match(text, start)
            run = fixed or _RUN.match(classes, start)
            end = start + 1 if run is None else run.end()
            if fixed is not None and fixed[0] not in _CONTRACTIONS:
                # Such a word is split off as a whole, then split again.
                yield from (text[each.start() : each.end()] for each in _RUN.finditer(classes, start, end))
            elif run is not None:
                yield text[start:end]
            start = end

    def _encode_word(self, word: str) -> list[int]:
        ids = self._words.get(word)
        if ids is None:
            found = (self._vocabulary.get(token, self._unknown) for token in self._merge(word))
            ids = [index for index in found if index is not None]
            if len(self._words) < _MAX_CACHED_WORDS:
                self._words[word] = ids
        return ids

    def _merge(self, word: str) -> list[str]:
        """Split a word into tokens, in a time of n log n for n bytes."""
        tokens = [_LETTERS[byte] for byte in word.encode()]
        tokens[-1] += _END_OF_WORD
        before, after = list(range(-1, len(tokens) - 1)), list(range(1, len(tokens) + 1))
        queue: list[tuple[int, int]] = []  # rank, index of the left token

        def push(left: int) -> None:
            if left >= 0 and after[left] < len(tokens):
                rank = self._ranks.get((tokens[left], tokens[after[left]]))
                if rank is not None:
                    heapq.heappush(queue, (rank, left))

        for left in range(len(tokens)):
            push(left)
        while queue:
            rank, left = heapq.heappop(queue)
            right = after[left]
            if right >= len(tokens) or self._ranks.get((tokens[left], tokens[right])) != rank:
                continue  # one of the two was merged with another meanwhile
            tokens[left], tokens[right] = tokens[left] + tokens[right], ""
            after[left] = after[right]
            if after[left] < len(tokens):
                before[after[left]] = left
            push(before[left])
            push(left)
        return [token for token in tokens if token]


def _normalize(text: str) -> str:
    # Letter by letter: a capital sigma has one lower case, also at the end of a word.
    return "".join(map(str.lower, _SPACES.sub(" ", unicodedata.normalize("NFC", text))))


@functools.lru_cache(maxsize=10_000)
def _classify(letter: str) -> str:
    """Return L for letters, N for numbers, a space for white space, and P for the rest."""
    if letter == " ":
        return letter
    category = unicodedata.category(letter)[0]
    return category if category in "LN" else "P"


def _check_splitting(file: _File) -> list[str]:
    """Check that a text is normalised and split as CLIP's tokenizers do; return the words that are split off.

    Raises:
        ValueError: it is not.
    """
    if file.normalizer != _NORMALIZER:
        raise ValueError("got another normalizer than CLIP's")
    match file.pre_tokenizer:
        case {
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False},
            ]
        } if pattern.endswith(_PATTERN):
            separate = [token.content for token in file.added_tokens if f"{re.escape(token.content)}|" in pattern]
            if pattern == "".join(f"{re.escape(word)}|" for word in separate) + _PATTERN:
                return separate
    raise ValueError("got another pre-tokenizer than CLIP's")


def _byte_letters() -> list[str]:
    """Return a printable letter for each byte (`bytes_to_unicode` in OpenAI's simple_tokenizer.py).

    Printable bytes of Latin-1 are their own letters; the others have the letters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_LETTERS = _byte_letters()

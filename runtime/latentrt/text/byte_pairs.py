"""CLIP's byte-pair encoding (Radford et al. 2021; Sennrich et al. 2016), read from a `tokenizer.json`.

A text is normalised (NFC, lower case) and split into words, single digits and runs of other characters, without the
white space between them. Each piece becomes its UTF-8 bytes as printable characters, the last with the suffix `</w>`;
then the adjacent pair with the lowest merge rank is merged, until no adjacent pair has a rank.

Source: OpenAI's simple_tokenizer.py. The ids equal those of the tokenizers package for the same file
(`tests/parity/text/test_byte_pairs.py`), which installs the hub's client too: 34 MB that a runtime does not need.
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
# A run of letters, a digit, or a run of other characters, in the classes of `_classify`.
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
    """A token that is found in the text as it is: after the text is normalised if `normalized`, before otherwise."""

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


_DECODER = msgspec.json.Decoder(_File)


class BytePairEncoder:
    """CLIP's byte-pair encoder: text → token ids.

    Args:
        vocabulary: token → id.
        merges: pairs of tokens, by rank: the first is merged first.
        added: tokens that are found in a text before it is normalised, such as `<|endoftext|>`: token → id.
        normalized: tokens that are found in the normalised text: token → id.
        unknown: the id of a byte that the vocabulary lacks; None drops it.
        separate: words that the pre-tokenizer splits off after normalisation, such as `<|endoftext|>`, which the text
            may have as `<|EndOfText|>`.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        merges: Iterable[tuple[str, str]],
        added: Mapping[str, int],
        *,
        normalized: Mapping[str, int],
        unknown: int | None,
        separate: Iterable[str] = (),
    ) -> None:
        self._vocabulary, self._unknown = vocabulary, unknown
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._added, self._normalized = added, normalized
        self._fixed = re.compile("|".join(map(re.escape, [*separate, *_CONTRACTIONS])))
        self._words: dict[str, list[int]] = {}

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read the content of a `tokenizer.json`.

        Raises:
            ValueError: it is not the file of a CLIP tokenizer.
        """
        file = _DECODER.decode(data)
        separate = _check_splitting(file)
        model = file.model
        if model.type != "BPE" or model.end_of_word_suffix != _END_OF_WORD or model.continuing_subword_prefix:
            raise ValueError(
                f"got a {model.type} model with end_of_word_suffix {model.end_of_word_suffix!r} and "
                f"continuing_subword_prefix {model.continuing_subword_prefix!r}, expected BPE with "
                f"{_END_OF_WORD!r} and no prefix"
            )
        if model.dropout or model.fuse_unk or model.byte_fallback or model.ignore_merges:
            raise ValueError("got one of dropout, fuse_unk, byte_fallback and ignore_merges, expected none of them")
        for token in file.added_tokens:
            if token.single_word or token.lstrip or token.rstrip:
                raise ValueError(
                    f"got the added token {token.content!r} with one of single_word, lstrip and rstrip, expected none"
                )
        merges = [tuple(each.split(" ") if isinstance(each, str) else each) for each in model.merges]
        for pair in merges:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= model.vocab.keys():
                raise ValueError(f"got the merge {pair!r}, expected two tokens that make a token of the vocabulary")
        ids = {**model.vocab, **{token.content: token.id for token in file.added_tokens}}
        for content, index in ids.items():
            if not 0 <= index < len(ids):
                raise ValueError(
                    f"got the id {index} of {content!r}, expected 0 to {len(ids) - 1}: there are {len(ids)}"
                )
        unknown = None if model.unk_token is None else model.vocab.get(model.unk_token)
        added, normalized = (
            {token.content: token.id for token in file.added_tokens if token.normalized is after}
            for after in (False, True)
        )
        normalized = {_normalize(token): index for token, index in normalized.items()}
        return cls(model.vocab, merges, added, normalized=normalized, unknown=unknown, separate=separate)  # type: ignore[arg-type]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without begin and end."""
        ids: list[int] = []
        for part, index in _find_tokens(text, self._added):
            if index is not None:
                ids.append(index)
                continue
            for each, found in _find_tokens(_normalize(part), self._normalized):
                if found is not None:
                    ids.append(found)
                else:
                    ids += (one for word in self._split(each) for one in self._encode_word(word))
        return ids

    def _split(self, text: str) -> Iterator[str]:
        """Split a normalised text into words, digits and runs of other characters."""
        classes, start = "".join(map(_classify, text)), 0
        while start < len(text):
            fixed = self._fixed.match(text, start)
            run = fixed or _RUN.match(classes, start)
            end = start + 1 if run is None else run.end()
            if fixed is not None and fixed[0] not in _CONTRACTIONS:
                # ByteLevel, the second pre-tokenizer, splits such a word again.
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
        """Merge a word's bytes into tokens, in O(n log n) for n bytes."""
        tokens = [_BYTE_CHARACTERS[byte] for byte in word.encode()]
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


def _find_tokens(text: str, tokens: Mapping[str, int]) -> Iterator[tuple[str, int | None]]:
    """Split a text at the longest of some tokens; yield its pieces, each with the token's id or None."""
    if not tokens:
        yield text, None
        return
    longest_first = sorted(tokens, key=len, reverse=True)
    for piece in re.split(f"({'|'.join(map(re.escape, longest_first))})", text):
        yield piece, tokens.get(piece)


def _normalize(text: str) -> str:
    # Character by character: `str.lower` of a word makes its last Σ a ς, which CLIP's normalizer does not.
    return "".join(map(str.lower, _SPACES.sub(" ", unicodedata.normalize("NFC", text))))


@functools.lru_cache(maxsize=10_000)
def _classify(character: str) -> str:
    """Return L for letters, N for numbers, a space for white space, and P for the rest."""
    if character == " ":
        return character
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "P"


def _check_splitting(file: _File) -> list[str]:
    """Check that a text is normalised and split as CLIP's tokenizers do; return the words that are split off.

    Raises:
        ValueError: the normalizer or the pre-tokenizer is not CLIP's.
    """
    if file.normalizer != _NORMALIZER:
        raise ValueError(
            f"got the normalizer {file.normalizer!r}, expected CLIP's: NFC, white space as one space, lower case"
        )
    match file.pre_tokenizer:
        case {
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ]
        } if pattern.endswith(_PATTERN):
            separate = [token.content for token in file.added_tokens if f"{re.escape(token.content)}|" in pattern]
            # Of letters and other characters alone, so that ByteLevel splits such a word into the runs of `_RUN`.
            plain = all(re.fullmatch("(L|P)+", "".join(map(_classify, word))) and "'" not in word for word in separate)
            if plain and pattern == "".join(f"{re.escape(word)}|" for word in separate) + _PATTERN:
                return separate
    raise ValueError(f"got the pre-tokenizer {file.pre_tokenizer!r}, expected CLIP's")


def _byte_characters() -> list[str]:
    """Return a printable character for each byte (`bytes_to_unicode` in OpenAI's simple_tokenizer.py).

    Printable bytes of Latin-1 are their own characters; the others have those from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()

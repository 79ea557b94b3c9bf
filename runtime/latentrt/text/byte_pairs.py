"""CLIP's byte-pair encoding (Radford et al. 2021; Sennrich et al. 2016): text → token ids.

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

__all__ = ["CONTRACTIONS", "END_OF_WORD", "BytePairEncoder", "normalize"]

END_OF_WORD = "</w>"
# Unicode's White_Space, which differs from that of `str.isspace`.
_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# A run of letters, a digit, or a run of other characters, in the classes of `_classify`.
_RUN = re.compile("L+|N|P+")
# The cache of words takes at most 20 MB: long words are seldom seen twice.
_MAX_CACHED_WORDS = 10_000
_MAX_CACHED_CHARACTERS = 64


class BytePairEncoder:
    """CLIP's byte-pair encoder: text → token ids.

    Args:
        vocabulary: token → id.
        merges: pairs of tokens, by rank: the first is merged first.
        added: tokens that are found in a text before it is normalised, such as `<|endoftext|>`: token → id.
        normalized: tokens that are found in the normalised text, where they are normalised too: token → id.
        unknown: the id of a byte that the vocabulary lacks; None drops it.
        separate: words that the pre-tokenizer splits off after normalisation, such as `<|endoftext|>`, which the text
            may have as `<|EndOfText|>`. Letters and punctuation only.

    Attributes:
        added_tokens: the tokens of `added` and `normalized`: token → id.
        found_tokens: the same as they are found in a text: token → id.
        ids: every token → id.
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
        found = {normalize(token): index for token, index in normalized.items()}
        self.added_tokens = {**added, **normalized}
        self.found_tokens = {**added, **found}
        self.ids = {**vocabulary, **self.added_tokens}
        self._added, self._normalized = _TokenFinder(added), _TokenFinder(found)
        self._fixed = re.compile("|".join(map(re.escape, [*separate, *CONTRACTIONS])))
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without begin and end."""
        ids: list[int] = []
        for part, index in self._added.split(text):
            if index is not None:
                ids.append(index)
                continue
            for each, found in self._normalized.split(normalize(part)):
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
            if fixed is not None and fixed[0] not in CONTRACTIONS:
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
            if len(word) <= _MAX_CACHED_CHARACTERS and len(self._words) < _MAX_CACHED_WORDS:
                self._words[word] = ids
        return ids

    def _merge(self, word: str) -> list[str]:
        """Merge a word's bytes into tokens, in O(n log n) for n bytes."""
        tokens = [_BYTE_CHARACTERS[byte] for byte in word.encode()]
        tokens[-1] += END_OF_WORD
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


class _TokenFinder:
    """Finds some tokens in a text: from left to right, at each place the longest.

    A place costs one look-up for each length that tokens with its character have, whatever their number.
    """

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        lengths: dict[str, set[int]] = {}
        for token in tokens:
            lengths.setdefault(token[0], set()).add(len(token))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        self._first = re.compile(f"[{''.join(map(re.escape, lengths))}]") if tokens else None

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Yield the pieces of a text, each with its id if it is a token, else with None."""
        start = place = 0
        while self._first is not None and (found := self._first.search(text, place)):
            place = found.start()
            candidates = (text[place : place + length] for length in self._lengths[found[0]])
            token = next((each for each in candidates if each in self._tokens), None)
            if token is None:
                place += 1
                continue
            if start < place:
                yield text[start:place], None
            yield token, self._tokens[token]
            start = place = place + len(token)
        if start < len(text):
            yield text[start:], None


def normalize(text: str) -> str:
    """Return a text as CLIP normalises it: NFC, white space as one space, lower case."""
    # Character by character: `str.lower` of a word makes its last Σ a ς, which CLIP's normalizer does not.
    return "".join(map(str.lower, _SPACES.sub(" ", unicodedata.normalize("NFC", text))))


@functools.lru_cache(maxsize=10_000)
def _classify(character: str) -> str:
    """Return L for letters, N for numbers, a space for white space, and P for the rest."""
    if character == " ":
        return character
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "P"


def _byte_characters() -> list[str]:
    """Return a printable character for each byte (`bytes_to_unicode` in OpenAI's simple_tokenizer.py).

    Printable bytes of Latin-1 are their own characters; the others have those from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_CHARACTERS = _byte_characters()

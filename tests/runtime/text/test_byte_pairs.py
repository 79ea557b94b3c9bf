"""Byte-pair encoding of hand-made vocabularies. See `tests/parity/text` for real texts."""

from __future__ import annotations

from typing import Any

from latentrt.text.byte_pairs import BytePairEncoder


def encoder(*merges: str, vocabulary: str = "a b c a</w> b</w> c</w>", **options: Any) -> BytePairEncoder:
    pairs = [tuple(merge.split()) for merge in merges]
    tokens = [*vocabulary.split(), *("".join(pair) for pair in pairs)]
    ids = {token: index for index, token in enumerate(tokens)}
    options = {"added": {}, "normalized": {}, "unknown": None, **options}
    return BytePairEncoder(ids, pairs, **options)  # type: ignore[arg-type]


def test_the_first_merge_wins_wherever_it_is() -> None:
    assert encoder("b c</w>", "a b").encode("abc") == [0, 6]
    assert encoder("a b", "b c</w>").encode("abc") == [6, 5]


def test_equal_pairs_are_merged_from_the_left() -> None:
    assert encoder("a a").encode("aaab") == [6, 0, 4]


def test_a_merge_makes_new_pairs_on_both_sides() -> None:
    assert encoder("b c", "a bc", "abc a</w>").encode("abca") == [8]


def test_a_byte_that_the_vocabulary_lacks() -> None:
    assert encoder().encode("axb") == [0, 4]
    assert encoder(unknown=9).encode("axb") == [0, 9, 4]


def test_added_tokens_are_found_before_the_text_is_normalised() -> None:
    found = encoder(added={"<A>": 7, "<A>B": 8}, vocabulary="<</w> > a b a</w> b</w> ></w>")
    assert found.encode("a<A>b<A>B") == [4, 7, 5, 8]
    assert found.encode("<a>") == [0, 4, 6], "not in another case"


class Counted(dict[Any, int]):
    """A mapping that counts look-ups."""

    lookups = 0

    def get(self, *arguments: Any) -> Any:
        self.lookups += 1
        return super().get(*arguments)

    def __contains__(self, key: object) -> bool:
        self.lookups += 1
        return super().__contains__(key)


def test_a_long_word_needs_a_linear_number_of_lookups() -> None:
    """A search of the whole word for each merge would need n² / 2."""
    found, letters = encoder("a a", "aa aa"), 2000
    ranks = found._ranks = Counted(found._ranks)
    assert len(found.encode("a" * (letters + 1))) == letters // 4 + 1  # the last letter ends the word
    assert ranks.lookups < 10 * letters


def test_the_longest_added_token_is_found_from_left_to_right() -> None:
    found = encoder(added={"<c>": 7, "<c>_1": 8, "<c>_12": 9, "_1<c": 10}, vocabulary="<</w> > a b a</w> b</w> ></w>")
    assert found.encode("<c>_1<c>_12<c>a") == [8, 9, 7, 4]
    assert found.encode("<c_1<c>") == [0, 10, 6]


def test_normalised_tokens_are_found_in_any_case() -> None:
    found = encoder(normalized={"<Cat>": 7}, vocabulary="a b a</w> b</w>")
    assert found.encode("a<CAT>b<cat>") == [2, 7, 3, 7]


def test_many_added_tokens_cost_a_look_up_for_each_length() -> None:
    """Trying every token at every place would take minutes: 8,000 tokens, 10,000 places."""
    found = encoder(added={f"a{number:04}": number for number in range(8000)}, vocabulary="a 0")
    counted = found._added._tokens = Counted(found._added._tokens)
    found.encode("a" * 10_000)
    assert counted.lookups == 10_000


def test_long_words_are_not_kept() -> None:
    found = encoder(vocabulary="a a</w>")
    found.encode("a" * 64 + " " + "a" * 65)
    assert list(found._words) == ["a" * 64]

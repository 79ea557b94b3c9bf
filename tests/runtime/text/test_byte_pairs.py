"""Byte-pair encoding of hand-made vocabularies, and files that are refused. See `tests/parity/text` for real texts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from latentrt import Bundle
from latentrt.errors import BundleError
from latentrt.text.byte_pairs import BytePairEncoder
from latentrt.text.tokenizer import Tokenizer


@pytest.fixture
def tree(bundle: Bundle) -> Any:
    return json.loads(bundle.read(bundle.manifest.tokenizers["text_encoder"].file))


def read(tree: Any) -> BytePairEncoder:
    return BytePairEncoder.from_json(json.dumps(tree).encode())


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


class Ranks(dict[Any, int]):
    """Merge ranks that count lookups."""

    lookups = 0

    def get(self, *arguments: Any) -> Any:
        self.lookups += 1
        return super().get(*arguments)


def test_a_long_word_needs_a_linear_number_of_lookups() -> None:
    """A search of the whole word for each merge would need n² / 2."""
    found, letters = encoder("a a", "aa aa"), 2000
    ranks = found._ranks = Ranks(found._ranks)
    assert len(found.encode("a" * (letters + 1))) == letters // 4 + 1  # the last letter ends the word
    assert ranks.lookups < 10 * letters


def test_merges_may_be_strings_or_pairs(tree: Any) -> None:
    text = "a red circle, a blue star"
    expected = read(tree).encode(text)
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]
    assert read(tree).encode(text) == expected


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("model/type", "Unigram", "Unigram"),
        ("model/end_of_word_suffix", None, "</w>"),
        ("model/byte_fallback", True, "byte_fallback"),
        ("model/merges", [["a", "b", "c"]], "merge"),
        ("model/merges", [["☃", "☃"]], "merge"),
        ("model/vocab", {"a": "b"}, "vocab"),
        ("model/merges", [["", "a"]], "merge"),
        ("model/vocab/a", -1, "id -1"),
        ("model/vocab/a", 10_000, "id 10000"),
        ("added_tokens/0/id", 10**25, "added_tokens|id"),
        ("normalizer", None, "normalizer"),
        ("normalizer/normalizers", [{"type": "NFKC"}], "normalizer"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre-tokenizer"),
        ("pre_tokenizer/pretokenizers/0/pattern/Regex", "[a-z]+", "pre-tokenizer"),
        ("pre_tokenizer/pretokenizers/1/add_prefix_space", True, "pre-tokenizer"),
        ("pre_tokenizer/pretokenizers/1/use_regex", False, "pre-tokenizer"),
        ("added_tokens/0/lstrip", True, "lstrip"),
    ],
)
def test_other_tokenizers_are_refused(tree: Any, path: str, value: object, reason: str) -> None:
    *folders, key = path.split("/")
    place = tree
    for name in folders:
        place = place[int(name) if name.isdigit() else name]
    place[key] = value
    with pytest.raises(ValueError, match=reason):
        read(tree)


def test_words_that_the_pre_tokenizer_splits_otherwise_are_refused(tree: Any) -> None:
    """ByteLevel keeps digits together and splits contractions, which the runs here do not."""
    pattern = tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    for word in ("<e12>", "<it's>", "a b"):
        tree["added_tokens"][0]["content"] = word
        pattern["Regex"] = "<\\|endoftext\\|>|".join(["", pattern["Regex"].split("<\\|endoftext\\|>|")[-1]])
        pattern["Regex"] = f"{re.escape(word)}|{pattern['Regex']}"
        with pytest.raises(ValueError, match="pre-tokenizer"):
            read(tree)


def test_a_deeply_nested_file_is_refused(bundle: Bundle) -> None:
    record = bundle.manifest.tokenizers["text_encoder"]
    nested = b'{"model": ' + b"[" * 100_000
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.from_json(nested, record)

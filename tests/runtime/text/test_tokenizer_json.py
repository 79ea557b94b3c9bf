"""Files that are and are not CLIP's, in their forms; mutations of a file; files of adversaries."""

from __future__ import annotations

import copy
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from latentrt import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.errors import BundleError
from latentrt.text import tokenizer_json
from latentrt.text.tokenizer import Tokenizer
from latentrt.text.tokenizer_json import MAX_BYTES, read_tokenizer_json

TEXT = "It's a red circle, a blue star <|EndOfText|>!!"


def sample_tree() -> Any:
    """Return the content of the sample bundle's file."""
    sample = Bundle.open(bundle_path())
    return json.loads(sample.read(sample.manifest.tokenizers["text_encoder"].file, MAX_BYTES))


@pytest.fixture
def tree() -> Any:
    return sample_tree()


def encode(tree: Any, *, framed: bool = False) -> list[int]:
    return read_tokenizer_json(json.dumps(tree).encode(), framed=framed).encode(TEXT)


def strings_for_merges(tree: Any) -> None:
    tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]


def older_byte_level(tree: Any) -> None:
    del tree["pre_tokenizer"]["pretokenizers"][1]["use_regex"]


def no_optional_sections(tree: Any) -> None:
    for key in ("post_processor", "decoder", "truncation", "padding", "version"):
        tree.pop(key, None)


@pytest.mark.parametrize("change", [strings_for_merges, older_byte_level, no_optional_sections])
def test_other_forms_of_the_same_file(tree: Any, change: Callable[[Any], None]) -> None:
    expected = encode(tree)
    change(tree)
    assert encode(tree) == expected


def test_an_older_pattern_does_not_split_off_special_words(tree: Any) -> None:
    split = tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    start = "<\\|startoftext\\|>|<\\|endoftext\\|>|"
    assert split["Regex"].startswith(start)
    newer = encode(tree)
    split["Regex"] = split["Regex"].removeprefix(start)
    assert encode(tree) != newer


def test_only_a_checkpoint_has_truncation_and_padding(tree: Any) -> None:
    expected = encode(tree)
    tree["truncation"] = {"direction": "Right", "max_length": 77, "strategy": "LongestFirst", "stride": 0}
    assert encode(tree, framed=True) == expected
    with pytest.raises(ValueError, match="truncation"):
        encode(tree)


SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
TEMPLATE = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 9, "pair": []}


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("model/type", "Unigram", "Unigram"),
        ("model/type", "WordLevel", "WordLevel"),
        ("model", {"type": "Unigram", "vocab": [["a", 0.5]], "unk_id": 0}, "Unigram"),
        ("model", {"vocab": {}, "merges": []}, "type"),
        ("model/end_of_word_suffix", None, "</w>"),
        ("model/continuing_subword_prefix", "##", "##"),
        ("model/byte_fallback", True, "byte_fallback"),
        ("model/dropout", 0.5, "dropout"),
        ("model/fuse_unk", True, "fuse_unk"),
        ("model/ignore_merges", True, "ignore_merges"),
        ("model/unk_token", "<none>", "unk_token"),
        ("model/surprise", 1, "surprise"),
        ("model/merges", [["a", "b", "c"]], "merge"),
        ("model/merges", ["a b c"], "merge"),
        ("model/merges", [["☃", "☃"]], "merge"),
        ("model/merges", [["", "a"]], "merge"),
        ("model/merges", [["r", "e"], ["r", "e"]], "twice"),
        ("model/vocab", {"a": "b"}, "vocab"),
        ("model/vocab/a", -1, "id -1"),
        ("model/vocab/a", 10_000, "id 10000"),
        ("model/vocab/a", 10**9, "id 1000000000"),
        ("model/vocab/a", True, "bool"),
        ("model/vocab/a", 1.0, "float"),
        ("model/vocab/a", 5, "of another token"),
        ("model/vocab/", 560, "0 characters"),
        ("model/vocab/" + "long" * 100, 560, "400 characters"),
        ("added_tokens/0/id", 10**25, "added_tokens|id"),
        ("added_tokens/0/id", 3, "id 3 of the added token"),
        ("added_tokens/0/content", "", "0 characters"),
        ("added_tokens/0/content", "<|endoftext|>", "twice|id"),
        ("added_tokens/0/lstrip", True, "lstrip"),
        ("added_tokens/0/rstrip", True, "rstrip"),
        ("added_tokens/0/single_word", True, "single_word"),
        (
            "added_tokens",
            [{"id": 680, "content": "<Cat>", "normalized": True}, {"id": 681, "content": "<CAT>", "normalized": True}],
            "'<Cat>' and '<CAT>'",
        ),
        ("normalizer", None, "normalizer"),
        ("normalizer/normalizers", [{"type": "NFKC"}], "NFKC"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "A" * 10_000}, "Precompiled"),
        ("normalizer/normalizers/1", {"type": "Prepend", "prepend": "_"}, "Prepend"),
        ("normalizer/normalizers/1/pattern/Regex", "(a+)+b", "Replace"),
        ("pre_tokenizer", {"type": "Whitespace"}, "Whitespace"),
        ("pre_tokenizer/pretokenizers/0", SPLIT, "Split"),
        ("pre_tokenizer/pretokenizers/0/pattern/Regex", "[a-z]+", "pattern"),
        ("pre_tokenizer/pretokenizers/1/add_prefix_space", True, "ByteLevel"),
        ("pre_tokenizer/pretokenizers/1/use_regex", False, "ByteLevel"),
        ("post_processor", TEMPLATE, "TemplateProcessing"),
        ("decoder", {"type": "Replace", "pattern": {"Regex": "(a+)+"}, "content": ""}, "Replace"),
        ("padding", {"strategy": {"Fixed": 10**9}}, "padding"),
        ("surprise", 1, "surprise"),
    ],
)
def test_other_tokenizers_are_refused_by_name(tree: Any, path: str, value: object, reason: str) -> None:
    *folders, key = path.split("/")
    place = tree
    for name in folders:
        place = place[int(name) if name.isdigit() else name]
    place[int(key) if isinstance(place, list) else key] = value
    with pytest.raises(ValueError, match=reason) as refusal:
        encode(tree)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(("limit", "reason"), [("MAX_TOKENS", "680 tokens"), ("MAX_ADDED_TOKENS", "2 added tokens")])
def test_files_of_too_many_tokens(tree: Any, limit: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_json, limit, 1)
    with pytest.raises(ValueError, match=f"{reason}, expected at most 1"):
        encode(tree)


def test_words_that_the_pre_tokenizer_splits_otherwise_are_refused(tree: Any) -> None:
    """ByteLevel keeps digits together and splits contractions, which the runs here do not."""
    pattern = tree["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    rest = pattern["Regex"].split("<\\|endoftext\\|>|")[-1]
    for word in ("<e12>", "<it's>", "a b"):
        pattern["Regex"] = f"{re.escape(word)}|{rest}"
        with pytest.raises(ValueError, match="pattern"):
            encode(tree)


def test_a_word_of_half_a_character_is_refused(tree: Any) -> None:
    tree["model"]["vocab"]["\ud800"] = len(tree["model"]["vocab"])
    with pytest.raises(ValueError, match="hex escape"):
        encode(tree)


@pytest.mark.parametrize(
    "data",
    [
        b'{"model": ' + b"[" * 100_000,
        b'{"normalizer": ' + b'{"type":' * 100_000,
        b'{"model": {"type": "BPE", "vocab": {"a": ' + b"9" * 1_000_000 + b'}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {}, "merges": [' + b"[]," * 2_000_000 + b'[]]}, "normalizer": 0}',
        b'{"model": {"type": "BPE"}, "normalizer": [' + b"[]," * 2_000_000 + b'[]], "pre_tokenizer": 0}',
        b'{"model": "\xff"}',
        b"",
    ],
    ids=["nested list", "nested objects", "digits", "merges", "sections", "not UTF-8", "empty"],
)
def test_files_of_adversaries_are_refused_at_once(bundle: Bundle, data: bytes) -> None:
    record = bundle.manifest.tokenizers["text_encoder"]
    began = time.perf_counter()
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer.from_json(data, record)
    assert time.perf_counter() - began < 5, "0.1 s on a quiet core"


def test_sizes_are_bounded_whatever_the_content(tree: Any) -> None:
    data = json.dumps(tree).encode()
    read_tokenizer_json(data + b" " * (MAX_BYTES - len(data)))
    with pytest.raises(ValueError, match=r"8,388,609 bytes, expected at most 8,388,608"):
        read_tokenizer_json(data + b" " * (MAX_BYTES + 1 - len(data)))
    for section in (b'"normalizer": {', b'"pre_tokenizer": {', b'"decoder": {'):
        assert section in data
        with pytest.raises(ValueError, match="at most 4,096 bytes"):
            read_tokenizer_json(data.replace(section, section + b" " * 4096))


def test_mutations_end_in_an_encoder_or_a_value_error() -> None:
    refused = sum(not is_read(data) for data in mutations(sample_tree(), seed=0, count=200))
    assert 100 < refused < 200, "most mutations matter, and some do not"


def is_read(data: bytes) -> bool:
    """Return whether a file is read and encodes a text; anything but a ValueError is a fault."""
    try:
        encoder = read_tokenizer_json(data)
    except ValueError:
        return False
    ids = encoder.encode(TEXT)
    assert max(ids, default=0) < len(encoder.ids)
    return True


NASTY: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2**63,
        10**30,
        1e308,
        0.5,
        "",
        " ",
        "a",
        "<|endoftext|>",
        "a" * 10_000,
        "\ud800",
        "\x1b[31m",
    ),
    *([], {}, [[]] * 1000, {"type": "Precompiled"}, {"type": "Sequence", "normalizers": []}, ["a", "b"], ["", ""]),
)


def mutations(tree: Any, *, seed: int, count: int) -> Iterator[bytes]:
    """Yield mutations of a JSON text: values replaced, keys removed, renamed and doubled, bytes changed."""
    rng, data = random.Random(seed), json.dumps(tree).encode()
    for number in range(count):
        if number % 4 == 0:
            damaged = bytearray(data)
            for _ in range(rng.randrange(1, 4)):
                start = rng.randrange(len(damaged))
                damaged[start : start + rng.choice((0, 1, 1, 50))] = rng.randbytes(rng.randrange(3)) or b'"'
            yield bytes(damaged)
        else:
            changed = copy.copy(tree)
            _mutate(changed, rng)
            yield json.dumps(changed).encode()


def _mutate(place: Any, rng: random.Random) -> None:
    """Change one value below `place`, whose containers on the way are copied."""
    key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
    below = place[key]
    if isinstance(below, (dict, list)) and below and rng.random() < 0.8:
        place[key] = copy.copy(below)
        _mutate(place[key], rng)
        return
    match rng.randrange(4):
        case 0:
            del place[key]
        case 1 if isinstance(place, dict):
            place[f"{key}{rng.choice(('', ' ', '_1', chr(0)))}"] = place.pop(key)
        case _:
            place[key] = rng.choice(NASTY)

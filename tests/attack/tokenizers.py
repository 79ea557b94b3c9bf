"""Tokenizer files that are not CLIP's, too large or contradictory, and texts that are hard to encode.

A case reads a file, as an export and as a run do, and encodes a text with what was read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.errors import LatentRTError
from latentrt.text.tokenizer import Tokenizer
from latentrt.text.tokenizer_json import MAX_BYTES, read_tokenizer_json

__all__ = ["Case", "cases", "run", "unchanged"]

Tree = Any
TEXT = "It's a red circle, a blue star <|EndOfText|>!!"
_WORD = "supercalifragilistic"


@dataclass(frozen=True)
class Case:
    """A file and a text.

    Attributes:
        make: makes the content of the file when the case runs: some are large.
        text: the text.
        foreign: no reader may accept the file.
    """

    make: Callable[[], bytes]
    text: str = TEXT
    foreign: bool = True


def unchanged() -> bytes:
    """Return the sample bundle's file."""
    sample = Bundle.open(bundle_path())
    return sample.read(sample.manifest.tokenizers["text_encoder"].file, MAX_BYTES)


def cases() -> Iterator[tuple[str, Case]]:
    """Yield every case."""
    for place, value in (*_models(), *_tokens(), *_sections()):
        yield f"{place}={_name(value)}", Case(functools.partial(_changed, place, value))
    for name, make in _large().items():
        yield name, Case(make)
    for name, data in _raw().items():
        yield name, Case(functools.partial(bytes, data))
    for name, change in _harmless().items():
        yield name, Case(functools.partial(_edited, change), foreign=False)
    for name, text in _texts().items():
        yield f"text: {name}", Case(unchanged, text, foreign=False)


def run(case: Case, folder: Path) -> LatentRTError | None:
    """Read a file in both ways, and encode the text; nothing is written.

    Raises:
        AssertionError: a foreign file was read, or an id has no row in the embedding.
    """
    data, record = case.make(), Bundle.open(bundle_path()).manifest.tokenizers["text_encoder"]
    try:
        read_tokenizer_json(data, framed=True)
        assert not case.foreign, "an export reads the file"
    except ValueError as error:
        if len(str(error)) > 2000:
            raise AssertionError("a long error") from None
    try:
        tokenizer = Tokenizer.from_json(data, record)
        assert not case.foreign, "a run reads the file"
        ids = tokenizer.chunks(case.text)
    except LatentRTError as error:
        return error
    assert 0 <= ids.min() <= ids.max() < record.rows, "an id without a row"
    return None


def _models() -> Iterator[tuple[str, Any]]:
    """Yield other models, and options that CLIP's has not."""
    for kind in ("Unigram", "WordPiece", "WordLevel", "bpe", "", "\x1b[2J", "B" * 100_000, None, 1):
        yield "model/type", kind
    yield "model", {"type": "Unigram", "vocab": [["a", -1e308]] * 1000, "unk_id": 10**9}
    yield "model", {"type": "WordPiece", "vocab": {"a": 0}, "max_input_chars_per_word": 10**18}
    for key in ("byte_fallback", "fuse_unk", "ignore_merges"):
        yield f"model/{key}", True
    for dropout in (0.5, 1e308, -1, "x"):
        yield "model/dropout", dropout
    for suffix in (None, "", "</W>", "\0", "w" * 100_000):
        yield "model/end_of_word_suffix", suffix
    yield "model/continuing_subword_prefix", "##"
    for unknown in ("<none>", "", "\ud800", 0):
        yield "model/unk_token", unknown
    for merge in ("a b c", "a", "", " ", "a  b", ["a"], ["a", "b", "c"], ["", "a"], ["a", ""], ["☃", "☃"], ["r", 1], 7):
        yield "model/merges", [merge]
    yield "model/merges", [["r", "e"], "r e"]
    yield "model/merges", {"r": "e"}


def _tokens() -> Iterator[tuple[str, Any]]:
    """Yield ids and words that no vocabulary may have."""
    indices: tuple[Any, ...] = (-1, 5, 680, 10**9, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 1.0, 1e308)
    for index in (*indices, True, None, "1", []):
        yield "model/vocab/a", index
        yield "added_tokens/0/id", index
    for word in ("", "w" * 257, "w" * 100_000, "\ud800", "\udfff\ud800", "a</w></w>"):
        yield f"model/vocab/{word}", 100_000
    for content in ("", "\ud800", "<|endoftext|>", "w" * 100_000, None):
        yield "added_tokens/0/content", content
    for key in ("single_word", "lstrip", "rstrip"):
        yield f"added_tokens/0/{key}", True
    pair = [{"id": 680 + index, "content": word, "normalized": True} for index, word in enumerate(("<É>", "<E\u0301>"))]
    yield "added_tokens", pair
    yield "added_tokens", [{"id": 0}]
    yield "added_tokens", {"id": 0, "content": "a"}


def _sections() -> Iterator[tuple[str, Any]]:
    """Yield normalisers, splitters, templates and regular expressions that cost time or memory where they are run."""
    slow = {"Regex": "(a+)+$"}
    replace = {"type": "Replace", "pattern": slow, "content": "a" * 1000}
    prepend = {"type": "Prepend", "prepend": "_" * 1000}
    split = {"type": "Split", "pattern": slow, "behavior": "Isolated", "invert": False}
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 50, "pair": []}
    normalizers: list[Any] = [
        *(None, {}, [], "NFC", {"type": "NFKC"}, {"type": "BertNormalizer"}, {"type": "StripAccents"}),
        *(replace, prepend),
        *({"type": "Sequence", "normalizers": [each] * 10} for each in (replace, prepend, {"type": "NFC"})),
        *({"type": "Precompiled", "precompiled_charsmap": "A" * size} for size in (0, 3, 4, 3000, 5_000_000)),
    ]
    for normalizer in normalizers:
        yield "normalizer", normalizer
    yield "normalizer/normalizers/1/pattern/Regex", "(\\s+)+"
    yield "normalizer/normalizers/1/content", " " * 4000
    for splitter in (None, {"type": "Metaspace"}, {"type": "Whitespace"}, {"type": "Sequence"}, split):
        yield "pre_tokenizer", splitter
    yield "pre_tokenizer/pretokenizers", [split] * 20
    for pattern in ("[a-z]+", "(a+)+b", "(?:" * 500, "", "a{65535}{65535}", "\\p{L}", None):
        yield "pre_tokenizer/pretokenizers/0/pattern/Regex", pattern
    yield "pre_tokenizer/pretokenizers/0/pattern", {"String": "a"}
    for key in ("add_prefix_space", "use_regex"):
        yield f"pre_tokenizer/pretokenizers/1/{key}", key == "add_prefix_space"
    for processor in (template, {"type": "BertProcessing"}, {"type": "Sequence", "processors": [template] * 9}, 1):
        yield "post_processor", processor
    for decoder in ({"type": "WordPiece"}, replace, {"type": "Sequence", "decoders": []}):
        yield "decoder", decoder
    for section in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"):
        yield section, {"type": "x" * 1_000_000}
    yield "surprise", 1
    yield "version", 1


def _large() -> dict[str, Callable[[], bytes]]:
    """Return files with too much of something, each below or above the largest size."""

    def added(count: int, tree: Tree) -> None:
        tree["added_tokens"] = [{"id": index, "content": f"<{index}>"} for index in range(count)]

    def vocabulary(count: int, tree: Tree) -> None:
        tree["model"]["vocab"] = {f"{index:x}": index for index in range(count)}

    def merges(count: int, tree: Tree) -> None:
        tree["model"]["merges"] = [["r", "e"]] * count

    edits: dict[str, Callable[[Tree], None]] = {}
    for make in (added, vocabulary, merges):
        for count in (200_000, 1_000_000):
            edits[f"{make.__name__}: {count:,}"] = functools.partial(make, count)
    return {name: functools.partial(_edited, edit) for name, edit in edits.items()}


def _raw() -> dict[str, bytes]:
    """Return contents that are no such file at all, or cost a parser much."""
    whole = unchanged()
    return {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "UTF-16": whole.decode().encode("utf-16"),
        "not UTF-8": whole.replace(b'"a"', b'"\xff"', 1),
        "a mark of byte order": b"\xef\xbb\xbf" + whole,
        "a second file": whole + whole,
        "a list": b"[]",
        "a number": b"1",
        "nested lists": b'{"model": ' + b"[" * 1_000_000,
        "nested models": b'{"model": ' * 500_000 + b"1" + b"}" * 500_000,
        "a nested normaliser": b'{"normalizer": ' + b'{"type":' * 500_000,
        "nested and closed": whole.replace(b'"normalizer"', b'"x":' + b"[" * 900 + b"]" * 900 + b',"normalizer"', 1),
        "an id of a million digits": b'{"model": {"type": "BPE", "vocab": {"a": ' + b"9" * 1_000_000 + b"}}}",
        "an id of 1e999": whole.replace(b'"vocab"', b'"vocab": {"a": 1e999}, "v"', 1),
        "two million empty merges": b'{"model": {"type": "BPE", "merges": [' + b"[]," * 2_000_000 + b"[]]}}",
        "two million keys": b"{" + b'"a":1,' * 1_300_000 + b'"a":1}',
        "spaces of 8 MiB": whole + b" " * (8 << 20),
        "NULs": bytes(1_000_000),
        "a SentencePiece model": b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\2" * 1000,
        "a pickle": b"\x80\x04\x95\0\0\0\0.",
    }


def _harmless() -> dict[str, Callable[[Tree], object]]:
    """Return changes that a reader may accept: none lets an id out that has no row."""

    def chain(tree: Tree) -> None:
        """Let one word be merged from 250 pieces, a letter at a time."""
        vocabulary = tree["model"]["vocab"]
        for length in range(2, 250):
            vocabulary["z" * length] = len(vocabulary)
            tree["model"]["merges"].append(["z" * (length - 1), "z"])

    def inversions(tree: Tree) -> None:
        rows = len(tree["model"]["vocab"])
        words = ["<a>", *(f"<a>_{index}" for index in range(1, 300))]
        tree["added_tokens"] += [{"id": rows + index, "content": word} for index, word in enumerate(words)]

    return {
        "no merges": lambda tree: tree["model"].update(merges=[]),
        "no added tokens": lambda tree: tree.update(added_tokens=[]),
        "a long chain of merges": chain,
        "an inversion of 300 vectors": inversions,
        "the key model twice": lambda tree: tree.update(version="1.0"),
    }


def _texts() -> dict[str, str]:
    return {
        "empty": "",
        "NULs": "\0" * 10_000,
        "spaces": " \t\n\u3000\x85" * 20_000,
        "a word of 120 kB": "a" * 120_000,
        "a word of 120 kB that is merged": (_WORD * 6_000)[:120_000],
        "a word of 120 kB of two letters": "re" * 60_000,
        "digits": "1" * 120_000,
        "apostrophes": "'" * 120_000,
        "contractions": "'s're'll" * 15_000,
        "combining marks": "a" + "\u0301" * 60_000,
        "marks out of order": "a" + "\u0316\u0301" * 60_000,
        "marks of a mark": "a" + "\u0f73" * 60_000,
        "marks of many letters": ("a" + "\u0316\u0301" * 450) * 130,
        "Hangul": "\u1112\u1161\u11ab" * 20_000,
        "one character that becomes eighteen": "\ufdfa" * 20_000,
        "a dotted capital I": "\u0130" * 60_000,
        "half a character": "\ud800",
        "halves in the wrong order": "\udc00\ud800" * 1000,
        "half a character in a word": "red\udfff circle",
        "emoji": "👩‍👩‍👧‍👦" * 5_000,
        "controls": "\x1b]0;x\x07\x1b[2J" * 1000,
        "directions": "\u202ered\u2066" * 10_000,
        "other planes": "\U0010ffff\U000e0001" * 10_000,
        "begins of tokens": "<|startoftext|" * 10_000,
        "tokens": "<|endoftext|>" * 10_000,
        "tokens in capitals": "<|EndOfText|>" * 10_000,
    }


def _changed(place: str, value: Any) -> bytes:
    return _edited(functools.partial(_set, place, value))


def _set(place: str, value: Any, tree: Tree) -> None:
    *folders, key = place.split("/", 2 if place.startswith("model/vocab/") else -1)
    for name in folders:
        tree = tree[int(name) if name.isdigit() else name]
    tree[int(key) if isinstance(tree, list) else key] = value


def _edited(change: Callable[[Tree], object]) -> bytes:
    tree = json.loads(unchanged())
    change(tree)
    return json.dumps(tree).encode()


def _name(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]}…{len(text)}"

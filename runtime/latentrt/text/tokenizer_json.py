"""Reads a `tokenizer.json`, the format of the tokenizers package, as far as it describes CLIP's byte-pair encoding.

The format can describe any tokenizer: other models, regular expressions, replacements, templates, tables of Unicode
normalisation. This reader takes the parts that CLIP's tokenizers have and rejects every other one by its name, as the
encoder (`latentrt.text.byte_pairs`) does exactly these. Sizes are checked before anything is built, so a file of any
content is read or rejected in a fraction of a second and in less than 200 MB.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from latentrt.bundle.printable import printable, quote
from latentrt.text.byte_pairs import CONTRACTIONS, END_OF_WORD, BytePairEncoder, normalize

__all__ = ["MAX_ADDED_TOKENS", "MAX_BYTES", "MAX_TOKEN_CHARACTERS", "read_tokenizer_json"]

MAX_BYTES = 8 << 20
"""CLIP's file has 3.6 MB in the form with one line for each token of a merge, the longest of its forms."""
MAX_TOKENS = 1 << 17
"""CLIP has 49,408 tokens."""
MAX_ADDED_TOKENS = 8192
MAX_TOKEN_CHARACTERS = 256
_MAX_SECTION_BYTES = 4096
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "NFC"},
        {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
        {"type": "Lowercase"},
    ],
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_PATTERN = "|".join([*CONTRACTIONS, r"[\p{L}]+", r"[\p{N}]", r"[^\s\p{L}\p{N}]+"])
_SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")
_TYPE = re.compile(rb'"type"\s*:\s*"(\w{1,40})"')
_NOTHING = msgspec.Raw(b"null")
Int64 = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of the file, which rejects keys that it does not declare."""


class _AddedToken(_Strict, frozen=True):
    """A token that is found in the text as it is: after the text is normalised if `normalized`, before otherwise."""

    id: Int64
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = False


class _Model(_Strict, frozen=True):
    """Byte pairs: token → id, and the merges, most frequent first: `["a", "b"]`, or `"a b"` in older files."""

    type: str
    vocab: dict[str, Int64]
    merges: list[list[str] | str]
    unk_token: str | None = None
    dropout: float | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool = False
    byte_fallback: bool = False
    ignore_merges: bool = False


class _File(_Strict, frozen=True):
    """The whole file. Sections of any form stay encoded until their size is checked."""

    model: msgspec.Raw
    normalizer: msgspec.Raw
    pre_tokenizer: msgspec.Raw
    added_tokens: list[_AddedToken] = []
    post_processor: msgspec.Raw = _NOTHING
    decoder: msgspec.Raw = _NOTHING
    truncation: msgspec.Raw = _NOTHING
    padding: msgspec.Raw = _NOTHING
    version: str = "1.0"


class _ModelType(msgspec.Struct, frozen=True):
    """The model's type alone, so that another model is rejected by its name and not by the form of its vocabulary."""

    type: str


_FILE = msgspec.json.Decoder(_File)
_MODEL = msgspec.json.Decoder(_Model)
_MODEL_TYPE = msgspec.json.Decoder(_ModelType)
_ANY = msgspec.json.Decoder()


def read_tokenizer_json(data: bytes, *, framed: bool = False) -> BytePairEncoder:
    """Read the content of a `tokenizer.json`.

    Args:
        data: the content.
        framed: accept truncation and padding, which checkpoints may have and bundles never have.

    Raises:
        ValueError: it is not the file of a CLIP tokenizer. The message names the section, its value and CLIP's.
    """
    if len(data) > MAX_BYTES:
        raise ValueError(f"got {len(data):,} bytes, expected at most {MAX_BYTES:,}")
    try:
        file = _FILE.decode(data)
        kind = _MODEL_TYPE.decode(file.model).type
        if kind != "BPE":
            raise ValueError(f"got a {printable(kind[:40])} model, expected BPE")
        model = _MODEL.decode(file.model)
    except RecursionError:
        raise ValueError("it is nested too deep, expected the few levels that CLIP's file has") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(printable(str(error))) from None
    _check_sections(file, framed=framed)
    _check_model(model)
    ids = _check_ids(model.vocab, file.added_tokens)
    merges = [_read_merge(each, model.vocab) for each in model.merges]
    if len(set(merges)) != len(merges):
        raise ValueError("got the same merge twice, expected each merge once")
    separate = _check_splitting(file)
    before, after = (
        {token.content: ids[token.content] for token in file.added_tokens if token.normalized is normalized}
        for normalized in (False, True)
    )
    unknown = None if model.unk_token is None else model.vocab[model.unk_token]
    return BytePairEncoder(model.vocab, merges, before, normalized=after, unknown=unknown, separate=separate)


def _check_sections(file: _File, *, framed: bool) -> None:
    """Check the sections that CLIP has in one form, and those without effect on the ids of a text."""
    if _read_section("normalizer", file.normalizer) != _NORMALIZER:
        raise _section_error("normalizer", file.normalizer, "CLIP's: NFC, white space as one space, lower case")
    match _read_section("post_processor", file.post_processor):
        case None | {"type": "RobertaProcessing", "sep": [str(), int()], "cls": [str(), int()]}:
            pass
        case _:
            raise _section_error("post_processor", file.post_processor, "RobertaProcessing")
    match _read_section("decoder", file.decoder):
        case None | {"type": "ByteLevel"}:
            pass
        case _:
            raise _section_error("decoder", file.decoder, "ByteLevel")
    for name, section in (("truncation", file.truncation), ("padding", file.padding)):
        if _read_section(name, section) is not None and not framed:
            raise _section_error(name, section, "null")


def _read_section(name: str, section: msgspec.Raw) -> Any:
    """Decode a section, whose size bounds the memory that it takes."""
    if len(bytes(section)) > _MAX_SECTION_BYTES:
        raise _section_error(name, section, f"at most {_MAX_SECTION_BYTES:,} bytes")
    try:
        return _ANY.decode(section)
    except (RecursionError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {printable(str(error))}") from None


def _section_error(name: str, section: msgspec.Raw, expected: str) -> ValueError:
    """Describe a section by the types that it names and by its beginning."""
    data = bytes(section)
    types = " of ".join(found.decode() for found in _TYPE.findall(data[: 1 << 16])[:6]) or "no type"
    start = printable(data[:160].decode("utf-8", "replace"))
    return ValueError(f"got the {name} {types} ({len(data):,} bytes: {start}), expected {expected}")


def _check_model(model: _Model) -> None:
    if model.end_of_word_suffix != END_OF_WORD or model.continuing_subword_prefix:
        raise ValueError(
            f"got end_of_word_suffix {quote(model.end_of_word_suffix)} and continuing_subword_prefix "
            f"{quote(model.continuing_subword_prefix)}, expected {END_OF_WORD!r} and no prefix"
        )
    options = ("dropout", "fuse_unk", "byte_fallback", "ignore_merges")
    for name in options:
        if getattr(model, name):
            raise ValueError(f"got {name} {getattr(model, name)}, expected none of {', '.join(options)}")
    for name, count in (("tokens", len(model.vocab)), ("merges", len(model.merges))):
        if count > MAX_TOKENS:
            raise ValueError(f"got {count:,} {name}, expected at most {MAX_TOKENS:,}")
    if model.unk_token is not None and model.unk_token not in model.vocab:
        raise ValueError(f"got the unk_token {quote(model.unk_token)}, expected a token of the vocabulary")


def _check_ids(vocabulary: Mapping[str, int], added: list[_AddedToken]) -> dict[str, int]:
    """Return the id of each token; ids are 0, 1, 2 … without a gap, each of one token."""
    if len(added) > MAX_ADDED_TOKENS:
        raise ValueError(f"got {len(added):,} added tokens, expected at most {MAX_ADDED_TOKENS:,}")
    ids, contents = dict(vocabulary), set[str]()
    spellings: dict[str, str] = {}
    for token in added:
        if token.single_word or token.lstrip or token.rstrip:
            raise ValueError(
                f"got the added token {quote(token.content)} with one of single_word, lstrip and rstrip, expected none"
            )
        if token.content in contents:
            raise ValueError(f"got the added token {quote(token.content)} twice, expected it once")
        if ids.setdefault(token.content, token.id) != token.id:
            raise ValueError(
                f"got the id {token.id} of the added token {quote(token.content)}, expected {ids[token.content]}, as "
                "in the vocabulary"
            )
        contents.add(token.content)
        if token.normalized:
            other = spellings.setdefault(normalize(token.content), token.content)
            if other != token.content:
                # The tokenizers package finds one of the two, another one in each process.
                raise ValueError(
                    f"got the added tokens {quote(other)} and {quote(token.content)}, which are the same word in a "
                    "normalised text; expected different words"
                )
    used = bytearray(len(ids))
    for content, index in ids.items():
        if not 0 < len(content) <= MAX_TOKEN_CHARACTERS:
            raise ValueError(
                f"got the token {quote(content)} of {len(content):,} characters, expected 1 to {MAX_TOKEN_CHARACTERS}"
            )
        if not 0 <= index < len(ids):
            raise ValueError(
                f"got the id {index} of {quote(content)}, expected 0 to {len(ids) - 1}: there are {len(ids)}"
            )
        if used[index]:
            raise ValueError(f"got the id {index} of {quote(content)} and of another token, expected it once")
        used[index] = 1
    return ids


def _read_merge(merge: list[str] | str, vocabulary: Mapping[str, int]) -> tuple[str, str]:
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) == 2:
        left, right = pair
        if left in vocabulary and right in vocabulary and left + right in vocabulary:
            return left, right
    raise ValueError(
        f"got the merge {quote(' '.join(pair[:3]))}, expected two tokens that make a token of the vocabulary"
    )


def _check_splitting(file: _File) -> tuple[str, ...]:
    """Check that a text is split as CLIP's tokenizers split it; return the words that are split off as they are."""
    found = _read_section("pre_tokenizer", file.pre_tokenizer)
    match found:
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Removed", "invert": True},
                {"type": "ByteLevel", **byte_level},
            ],
        } if _is_byte_level(byte_level):
            for separate in ((), _SPECIAL_TOKENS, _SPECIAL_TOKENS[::-1]):
                if pattern == "".join(f"{re.escape(word)}|" for word in separate) + _PATTERN:
                    return separate
            raise ValueError(f"got the pre-tokenizer's pattern {quote(pattern)}, expected CLIP's")
    raise _section_error("pre-tokenizer", file.pre_tokenizer, "CLIP's: Sequence of Split and ByteLevel")


def _is_byte_level(options: dict[Any, Any]) -> bool:
    """Return whether ByteLevel has CLIP's options; older files lack `use_regex`, and offsets do not matter to ids."""
    return {**_BYTE_LEVEL, **options, "trim_offsets": True} == _BYTE_LEVEL

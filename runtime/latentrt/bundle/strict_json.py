"""Strict parsing of JSON of unknown origin.

Rejects ambiguous texts: duplicate keys, NaN, integers beyond 64 bits and halves of surrogate pairs, which parsers
interpret differently. Bounds the size, the nesting and the number of values before anything is built from the text.
"""

from __future__ import annotations

import itertools
import json
import math
from typing import Any, Generic, TypeVar

import msgspec

from latentrt.bundle.printable import printable, quote

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "AmbiguousJSONError", "StrictDecoder", "check_extent", "parse_json"]

MAX_BYTES = 16 << 20
"""Longest text by default."""
MAX_DEPTH = 32
"""Deepest nesting by default: a manifest has 11 levels."""
MAX_VALUES = 1 << 20
"""Largest number of values by default. A value takes about 100 bytes of memory."""

_MAX_PROBLEM = 300  # characters of msgspec's description of a value that does not fit
_T = TypeVar("_T")


class AmbiguousJSONError(ValueError):
    """A fault of a JSON text. The message continues the file's name: `is not UTF-8 …`, `has the key 'a' twice …`.

    The message about a value that does not fit a decoder's type is a sentence: `Expected `int`, got `str` - at …`.
    """


def parse_json(
    data: bytes,
    *,
    infinity: bool = False,
    half_surrogates: bool = False,
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    max_values: int = MAX_VALUES,
) -> Any:
    """Parse a JSON text in UTF-8, in time and memory that are proportional to its size.

    Args:
        data: the text.
        infinity: accept `Infinity` and `-Infinity`, which Python writes and JSON does not have.
        half_surrogates: accept escaped halves of surrogate pairs, as in `"\\ud83d"`.
        max_bytes: the size of the longest text.
        max_depth: the deepest nesting; a list of numbers has 1.
        max_values: the largest number of values.

    Raises:
        AmbiguousJSONError: the text is not JSON, is ambiguous, or is beyond one of the bounds.
    """

    def constant(name: str) -> float:
        if infinity and name != "NaN":
            return float(name)
        raise _nonfinite_error(name)

    if len(data) > max_bytes:
        raise AmbiguousJSONError(f"is larger than {max_bytes:,} bytes, the limit")
    try:
        text = data.decode("utf-8")
        check_extent(data, max_depth, max_values)
        tree = json.loads(
            text,
            object_pairs_hook=_make_object,
            parse_constant=constant,
            parse_float=_parse_finite,
            parse_int=_parse_int64,
        )
        # Rare, as half a surrogate pair can only be written as an escape.
        if not half_surrogates and (b"\\ud" in data or b"\\uD" in data):
            json.dumps(tree, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise AmbiguousJSONError(f"is not UTF-8 (byte {error.start}), expected JSON in UTF-8") from None
    except UnicodeEncodeError:
        raise AmbiguousJSONError("has half a surrogate pair in a text, expected valid Unicode") from None
    except AmbiguousJSONError:
        raise
    except ValueError as error:
        raise AmbiguousJSONError(f"is not JSON, it may be truncated: {printable(str(error))}") from None
    return tree


class StrictDecoder(Generic[_T]):
    """A decoder of JSON texts that hold one type.

    Make it when a module is imported: msgspec describes a type at its first use, which crashes in several threads at
    once.

    Args:
        target: the type, as msgspec knows it.
        half_surrogates, max_bytes: as in `parse_json`.
    """

    def __init__(self, target: type[_T], *, half_surrogates: bool = False, max_bytes: int = MAX_BYTES) -> None:
        msgspec.json.Decoder(target)  # describes the type
        self._target = target
        self._half_surrogates, self._max_bytes = half_surrogates, max_bytes

    def decode(self, data: bytes) -> _T:
        """Parse a text once and return its value.

        Raises:
            AmbiguousJSONError: as `parse_json`, or as `convert`.
        """
        return self.convert(parse_json(data, half_surrogates=self._half_surrogates, max_bytes=self._max_bytes))

    def convert(self, tree: object) -> _T:
        """Return the value of a tree that `parse_json` returned, for a text whose version is checked before its form.

        Raises:
            AmbiguousJSONError: the tree does not fit the type.
        """
        try:
            return msgspec.convert(tree, self._target)
        except (msgspec.ValidationError, OverflowError) as error:
            raise AmbiguousJSONError(printable(str(error)[:_MAX_PROBLEM])) from None


# Everything but quotes, brackets and commas, which alone decide how deep and how large a text is.
_NO_STRUCTURE = bytes({*range(256)} - {*b'"[]{},'})
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1, ord(","): 0}


def check_extent(data: bytes, max_depth: int = MAX_DEPTH, max_values: int = MAX_VALUES) -> None:
    """Check the nesting and the number of values before anything is built from a text.

    Raises:
        AmbiguousJSONError: the text is beyond one of the bounds.
    """
    # Without escapes a quote begins or ends a string, so every second piece between quotes lies outside strings.
    unescaped = data.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in data else data
    structure = b"".join(unescaped.translate(None, _NO_STRUCTURE).split(b'"')[::2])
    if structure.count(b",") + structure.count(b"[") + structure.count(b"{") > max_values:
        raise AmbiguousJSONError(f"has more than {max_values:,} values, the limit")
    depth = itertools.accumulate(map(_STEPS.__getitem__, structure))
    if any(each > max_depth for each in depth):
        raise AmbiguousJSONError(f"is nested deeper than {max_depth} levels, the limit")


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise AmbiguousJSONError(f"has the key {quote(twice)} twice in one object, expected it once")
    return tree


def _parse_finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _nonfinite_error(digits)
    return number


def _nonfinite_error(text: str) -> AmbiguousJSONError:
    return AmbiguousJSONError(f"has the number {text[:25]}, expected finite numbers only, as JSON has no others")


def _parse_int64(digits: str) -> int:
    # Length first: converting a number of a million digits is slow.
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise AmbiguousJSONError(f"has the number {digits[:25]}, expected one of 64 bits")
    return int(digits)

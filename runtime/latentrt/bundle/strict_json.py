"""Strict parsing of JSON: rejects duplicate keys, NaN and integers beyond 64 bits, which parsers interpret
differently."""

from __future__ import annotations

import json
import math
from typing import Any

from latentrt.bundle.printable import printable

__all__ = ["AmbiguousJSONError", "parse_json"]


class AmbiguousJSONError(ValueError):
    """A fault of a JSON text. The message continues the file's name: `is not UTF-8 …`, `has the key 'a' twice …`."""


def parse_json(data: bytes, *, infinity: bool = False) -> Any:
    """Parse a JSON text in UTF-8.

    Args:
        data: the text.
        infinity: accept `Infinity` and `-Infinity`, which Python writes and JSON does not have.

    Raises:
        AmbiguousJSONError: the text is not JSON, or is ambiguous.
    """

    def constant(name: str) -> float:
        if infinity and name != "NaN":
            return float(name)
        raise _nonfinite_error(name)

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_make_object,
            parse_constant=constant,
            parse_float=_parse_finite,
            parse_int=_parse_int64,
        )
    except UnicodeDecodeError as error:
        raise AmbiguousJSONError(f"is not UTF-8 (byte {error.start}), expected JSON in UTF-8") from None
    except RecursionError:
        raise AmbiguousJSONError("is nested too deep, expected at most a few levels") from None
    except AmbiguousJSONError:
        raise
    except ValueError as error:
        raise AmbiguousJSONError(f"is not JSON, it may be truncated: {printable(str(error))}") from None


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise AmbiguousJSONError(f"has the key {twice!r} twice in one object, expected it once")
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

"""Strict parsing of JSON: duplicate keys, NaN and numbers beyond 64 bits, which readers interpret differently, are
refused."""

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
        raise _no_number(name)

    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=constant,
            parse_float=_finite,
            parse_int=_int64,
        )
    except UnicodeDecodeError as error:
        raise AmbiguousJSONError(f"is not UTF-8 (byte {error.start}), expected JSON in UTF-8") from None
    except RecursionError:
        raise AmbiguousJSONError("is nested deeper than any such file is") from None
    except AmbiguousJSONError:
        raise
    except ValueError as error:
        raise AmbiguousJSONError(f"is not JSON, it may be truncated: {printable(str(error))}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise AmbiguousJSONError(f"has the key {twice!r} twice in one object, expected it once")
    return tree


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _no_number(digits)
    return number


def _no_number(text: str) -> AmbiguousJSONError:
    return AmbiguousJSONError(f"has the number {text[:25]}, expected finite numbers, as JSON has no other")


def _int64(digits: str) -> int:
    # Length first: converting a number of a million digits takes a while.
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise AmbiguousJSONError(f"has the number {digits[:25]}, expected one of 64 bits")
    return int(digits)

"""What does a `scheduler_config.json` say?

It is read as diffusers writes it, which is Python's JSON: some classes have `-Infinity` for a default. What has more
than one meaning (a key twice, NaN, a number beyond 64 bits) is refused.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any, NoReturn

from latentrt.errors import RequestError
from latentrt.printable import printable

__all__ = ["MAX_CONFIG_BYTES", "read_scheduler_config"]

# The longest that there is holds the betas of a thousand timesteps, some 30 kB.
MAX_CONFIG_BYTES = 1 << 20

_MEND = "give a scheduler_config.json as diffusers saves it"


def read_scheduler_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in the file, with `_class_name` where the file has it.

    Raises:
        RequestError: the file cannot be read, is too large, or holds no JSON object of one meaning.
    """
    place = printable(os.fspath(path))
    try:
        with open(path, "rb") as stream:
            data = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise RequestError(f"{place} cannot be read: {error.strerror}; {_MEND}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise RequestError(f"{place} is larger than {MAX_CONFIG_BYTES:,} bytes, which no configuration is; {_MEND}")
    try:
        config = _parse(data)
    except UnicodeDecodeError as error:
        raise RequestError(f"{place} is not UTF-8 (byte {error.start}), expected JSON in UTF-8; {_MEND}") from None
    except RecursionError:
        raise RequestError(f"{place} is nested deeper than any configuration is; {_MEND}") from None
    except ValueError as error:
        raise RequestError(f"{place} is not JSON that can be used: {printable(str(error))}; {_MEND}") from None
    if not isinstance(config, dict):
        raise RequestError(f"{place} holds a {type(config).__name__}, expected a JSON object; {_MEND}")
    return config


def _parse(data: bytes) -> Any:
    return json.loads(
        data.decode("utf-8"),
        object_pairs_hook=_object,
        parse_constant=_infinity,
        parse_float=_finite,
        parse_int=_int64,
    )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"found the key {twice!r} twice in one object, expected it once")
    return tree


def _infinity(name: str) -> float:
    return _refuse(name) if name == "NaN" else float(name)


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(digits)


def _int64(digits: str) -> int:
    # Length first: converting a number of a million digits takes a while.
    return int(digits) if len(digits) <= 20 and -(2**63) <= int(digits) < 2**63 else _refuse(digits)


def _refuse(digits: str) -> NoReturn:
    raise ValueError(f"found the number {digits[:25]}, expected one of 64 bits")

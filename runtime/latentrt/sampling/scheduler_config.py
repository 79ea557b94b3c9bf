"""What does a `scheduler_config.json` say?

It is read as diffusers writes it, which is Python's JSON: some classes have `-Infinity` for a default. What has more
than one meaning (a key twice, NaN, a number beyond 64 bits) is refused.
"""

from __future__ import annotations

import os
from typing import Any

from latentrt.bundle.printable import printable
from latentrt.bundle.strict_json import AmbiguousJSONError, parse_json
from latentrt.errors import RequestError

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
        config = parse_json(data, infinity=True)
    except AmbiguousJSONError as error:
        raise RequestError(f"{place} {error}; {_MEND}") from None
    if not isinstance(config, dict):
        raise RequestError(f"{place} holds a {type(config).__name__}, expected a JSON object; {_MEND}")
    return config

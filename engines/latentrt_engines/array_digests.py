"""What tells one checkpoint's arrays from another's, one by one?"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

__all__ = ["array_digests"]


def array_digests(arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """A digest of each array's bytes, by name: 16 hexadecimal digits.

    Short, as it only tells what changed; what pins the weights is the SHA-256 of their file.
    """
    return {
        name: hashlib.blake2b(array.reshape(-1).view("u1").data, digest_size=8).hexdigest()
        for name, array in arrays.items()
    }

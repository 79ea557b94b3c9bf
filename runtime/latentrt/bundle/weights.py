"""Weights: a safetensors file, its digest, and the arrays in it.

The format (huggingface/safetensors, README): eight bytes of header length, little endian; the header, JSON, name →
dtype, shape and offsets behind the header; the bytes. A bundle's weights are memory-mapped, so a page needs memory only
once it is used.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.errors import BundleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["WeightSet", "map_weights"]

_DTYPES = {"F16": "<f2", "F32": "<f4", "I8": "i1", "U8": "u1"}
_LENGTH_BYTES = 8


@dataclass(frozen=True)
class WeightSet:
    """The weights of one component, for every backend.

    Attributes:
        path: of the file, compared with its digest.
        digest: its SHA-256 in hexadecimal; sets of one digest are equal.
    """

    path: Path
    digest: str

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, mapped from the file (`map_weights`)."""
        return map_weights(self.path)


def map_weights(path: Path) -> dict[str, NDArray[Any]]:
    """Map a file whose hash has been checked.

    Returns:
        Read-only arrays by name, float16, float32, int8 or uint8, over the file's own pages.

    Raises:
        BundleError: it is not a safetensors file of such weights.
    """
    import numpy as np  # here, so that commands which only read the manifest start without it

    try:
        mapped = np.memmap(path, np.uint8, mode="r")
        start = _LENGTH_BYTES + int.from_bytes(mapped[:_LENGTH_BYTES].tobytes(), "little")
        header = json.loads(mapped[_LENGTH_BYTES:start].tobytes())
        header.pop("__metadata__", None)
        return {name: _view(mapped[start:], entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(
            f"{path} cannot be read as safetensors of float16, float32, int8 or uint8: {error}; export the bundle again"
        ) from error


def _view(data: NDArray[np.uint8], entry: dict[str, Any]) -> NDArray[Any]:
    import numpy as np

    first, last = entry["data_offsets"]
    dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
    if not 0 <= first <= last <= len(data) or last - first != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"offsets {first} … {last} do not hold {entry['dtype']} of shape {shape}")
    return data[first:last].view(dtype).reshape(shape)

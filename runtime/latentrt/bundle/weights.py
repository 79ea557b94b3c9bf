"""Weights: a safetensors file, its digest, and the arrays in it.

The format is described in `latentrt.bundle.safetensors_header`. A bundle's weights are memory-mapped, so a page needs
memory only once it is used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.bundle.printable import shown
from latentrt.bundle.safetensors_header import TensorPlace, read_header
from latentrt.errors import BundleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["WeightSet", "map_weights"]

_DTYPES = {"F16": "<f2", "F32": "<f4", "I8": "i1", "U8": "u1"}


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
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            header = read_header(stream, size)
        if size != header.file_size:
            raise ValueError(f"the file has {size:,} bytes, expected {header.file_size:,} from its header")
        mapped = np.memmap(path, np.uint8, mode="r")
        return {name: _view(mapped, name, place) for name, place in header.tensors.items()}
    except (OSError, ValueError) as error:
        raise BundleError(
            f"{path} cannot be read as safetensors of float16, float32, int8 or uint8: {error}; export the bundle again"
        ) from error


def _view(data: NDArray[np.uint8], name: str, place: TensorPlace) -> NDArray[Any]:
    if place.dtype not in _DTYPES:
        raise ValueError(f"the tensor {shown(name)} is {place.dtype}")
    return data[place.start : place.end].view(_DTYPES[place.dtype]).reshape(place.shape)

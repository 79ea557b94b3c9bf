"""Weights: a safetensors file, its digest, and the arrays in it.

The format is described in `latentrt.bundle.safetensors_header`. A bundle's weights are memory-mapped, so a page needs
memory only once it is used.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latentrt.bundle.onnx_types import WEIGHT_DTYPES, WEIGHT_TYPES
from latentrt.bundle.printable import quote
from latentrt.bundle.safetensors_header import TensorPlace, read_header
from latentrt.errors import BundleError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["WeightSet", "map_weights"]


@dataclass(frozen=True)
class WeightSet:
    """The open weights of one component, for every backend.

    Attributes:
        digest: its SHA-256 in hexadecimal; sets of one digest are equal.
        stream: the file that was compared with the digest. Libraries read it through its descriptor: its path may lead
            to another file by now.
    """

    digest: str
    stream: BufferedReader

    @property
    def size(self) -> int:
        """The file's size in bytes."""
        return os.fstat(self.stream.fileno()).st_size

    def data(self) -> NDArray[np.uint8]:
        """Map the file's bytes, for a library that demands writable memory; writes to it do not reach the file."""
        return _map(self.stream, "c")

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, mapped from the file (`map_weights`); they outlive the open file."""
        return map_weights(self.stream)


def map_weights(file: Path | BufferedReader) -> dict[str, NDArray[Any]]:
    """Map a file whose hash has been checked.

    Returns:
        Read-only arrays by name, float16, float32, int8 or uint8, over the file's own pages.

    Raises:
        BundleError: it is not a safetensors file of such weights.
    """
    try:
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream:
            mapped = _map(stream, "r")
            stream.seek(0)
            header = read_header(stream, len(mapped))
        if len(mapped) != header.file_size:
            raise ValueError(f"the file has {len(mapped):,} bytes, expected {header.file_size:,} from its header")
        return {name: _view(mapped, name, place) for name, place in header.tensors.items()}
    except (OSError, ValueError) as error:
        name = file if isinstance(file, Path) else file.name
        raise BundleError(
            f"{name} cannot be read as safetensors of float16, float32, int8 or uint8: {error}; export the bundle again"
        ) from error


def _map(file: BufferedReader, mode: Literal["r", "c"]) -> NDArray[np.uint8]:
    import numpy as np  # here, so that commands which only read the manifest start without it

    return np.memmap(file, np.uint8, mode=mode)


def _view(data: NDArray[np.uint8], name: str, place: TensorPlace) -> NDArray[Any]:
    if place.dtype not in WEIGHT_TYPES:
        raise ValueError(f"the tensor {quote(name)} is {place.dtype}, expected one of {', '.join(WEIGHT_TYPES)}")
    return data[place.start : place.end].view(WEIGHT_DTYPES[WEIGHT_TYPES[place.dtype]]).reshape(place.shape)

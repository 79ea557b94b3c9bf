"""Writes a safetensors file one tensor at a time, in the memory of one tensor.

safetensors' own `save_file` needs all tensors at once. The header, which has every name, dtype and shape, comes first
in the format, and the bytes follow in the order that it gives.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from latentrt.bundle.safetensors_header import DTYPE_BITS

__all__ = ["SafetensorsWriter"]

_LENGTH_BYTES = 8
_ALIGNMENT = 8


class SafetensorsWriter:
    """A safetensors file that is being written, for a `with` statement.

    The file is incomplete until every tensor is written; after an error, the caller removes it.

    Attributes:
        names: the tensors in the order in which they have to be written. It is safetensors' own: dtypes of more bits
            first, so that every tensor is aligned, then by name.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        """Create the file and write its header.

        Args:
            path: the file; one that exists is replaced.
            tensors: name → dtype, by its name in the format, and shape.
            metadata: texts by name.

        Raises:
            OSError: the file cannot be written.
            ValueError: a dtype is unknown, or a tensor does not have whole bytes.
        """
        self.names = sorted(tensors, key=lambda name: (-_find_bits(tensors[name][0]), name))
        self._sizes = {name: _count_bytes(*tensors[name]) for name in self.names}
        self._written = 0
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name in self.names:
            dtype, shape = tensors[name]
            begin, end = end, end + self._sizes[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._stream = path.open("wb")
        try:
            self._stream.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        except BaseException:
            self._stream.close()
            raise

    def write(self, name: str, data: bytes | memoryview | NDArray[Any]) -> None:
        """Write the bytes of the next tensor.

        Args:
            name: the next of `names`.
            data: its elements, little-endian and contiguous, the last axis fastest.

        Raises:
            OSError: the file cannot be written.
            ValueError: it is not the next tensor, or has another number of bytes.
        """
        expected = self.names[self._written] if self._written < len(self.names) else None
        if name != expected:
            raise ValueError(f"got the tensor {name}, expected {expected}; write the tensors in the order of `names`")
        # numpy declares the buffer protocol from Python 3.12 on
        with memoryview(data) as view:  # type: ignore[arg-type]
            if view.nbytes != self._sizes[name] or not view.c_contiguous:
                layout = "contiguous" if view.c_contiguous else "scattered"
                raise ValueError(
                    f"got {view.nbytes} {layout} bytes of {name}, expected {self._sizes[name]} contiguous bytes"
                )
            self._stream.write(view)
        self._written += 1

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        if kind is None and self._written < len(self.names):
            raise ValueError(
                f"got {self._written} tensors, expected {len(self.names)}; the next is {self.names[self._written]}"
            )


def _find_bits(dtype: str) -> int:
    if dtype not in DTYPE_BITS:
        raise ValueError(f"got the dtype {dtype}, expected one of {', '.join(DTYPE_BITS)}")
    return DTYPE_BITS[dtype]


def _count_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"got {dtype} of shape {shape}, expected whole bytes")
    return bits // 8

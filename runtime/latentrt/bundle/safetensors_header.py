"""The header of a safetensors file, read strictly.

The format (huggingface/safetensors, README): eight bytes of header length, little endian; the header, JSON, name →
dtype, shape and offsets behind the header; the bytes. Offsets cover the bytes once, without a hole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import IO, Annotated

import msgspec

from latentrt.bundle.printable import quote
from latentrt.bundle.strict_json import AmbiguousJSONError, StrictDecoder, parse_json

__all__ = ["DTYPE_BITS", "MAX_HEADER_BYTES", "MAX_METADATA", "MAX_TENSORS", "Header", "TensorPlace", "read_header"]

MAX_HEADER_BYTES = 16 << 20
"""Longest header: a whole checkpoint's has less than 1 MB, and what a trainer writes into a LoRA's has a few MB."""
MAX_TENSORS = 20_000
"""Most tensors of a file: a checkpoint of Stable Diffusion XL has 2,500, a LoRA of all its layers 8,000."""
MAX_METADATA = 10_000
"""Most texts in the metadata; trainers write some hundred."""
_MAX_AXES = 16
_LENGTH_BYTES = 8
DTYPE_BITS = {
    "BOOL": 8,
    "I8": 8,
    "U8": 8,
    "I16": 16,
    "U16": 16,
    "I32": 32,
    "U32": 32,
    "I64": 64,
    "U64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
"""The bits of an element of each dtype of the format."""
_Size = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=_MAX_AXES)]
    data_offsets: tuple[_Size, _Size]


_ENTRY = StrictDecoder(_Entry)


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """One tensor: its dtype by the format's name, its shape, and its bytes in the file, from `start` to `end`."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Header:
    """The tensors of a file by name, in the header's order; its metadata; and the size that the file must have."""

    tensors: dict[str, TensorPlace]
    metadata: dict[str, str]
    file_size: int


def read_header(stream: IO[bytes], size: int) -> Header:
    """Read the header of a safetensors file, of unknown origin, in a few seconds and 200 MB at most.

    Args:
        stream: the open file, at its beginning.
        size: the file's size in bytes. It is not compared with `Header.file_size`, so that a caller can report both.

    Raises:
        ValueError: it is not the header of a safetensors file.
    """
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
    if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        raise ValueError(
            f"its first {_LENGTH_BYTES} bytes, the length of a header, say more than the {size:,} bytes that it has"
        )
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"the header has {length:,} bytes, expected {MAX_HEADER_BYTES:,} at most")
    # A tensor of `_MAX_AXES` axes has so many commas and brackets, and one text a comma.
    most = (6 + _MAX_AXES) * MAX_TENSORS + MAX_METADATA
    tree = parse_json(stream.read(length), max_bytes=MAX_HEADER_BYTES, max_depth=4, max_values=most)
    if not isinstance(tree, dict):
        raise ValueError(f"the header is a {type(tree).__name__}, expected an object")
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"__metadata__ is {quote(metadata)}, expected texts by name")
    if len(metadata) > MAX_METADATA:
        raise ValueError(f"the header has {len(metadata):,} texts in __metadata__, expected {MAX_METADATA:,} at most")
    if len(tree) > MAX_TENSORS:
        raise ValueError(f"the header has {len(tree):,} tensors, expected {MAX_TENSORS:,} at most")
    begin = _LENGTH_BYTES + length
    tensors = {name: _place(name, entry, begin) for name, entry in tree.items()}
    end = begin
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if place.start != end:
            problem = "overlaps another tensor" if place.start < end else "follows a hole"
            raise ValueError(f"the tensor {quote(name)} {problem}, expected its bytes from {end - begin:,} on")
        end = place.end
    return Header(tensors=tensors, metadata=metadata, file_size=end)


def _place(name: str, entry: object, begin: int) -> TensorPlace:
    try:
        found = _ENTRY.convert(entry)
    except AmbiguousJSONError as error:
        raise ValueError(f"the tensor {quote(name)}: {error}") from None
    if found.dtype not in DTYPE_BITS:
        raise ValueError(
            f"the tensor {quote(name)} has the dtype {quote(found.dtype)}, expected one of {', '.join(DTYPE_BITS)}"
        )
    first, last = found.data_offsets
    if (last - first) * 8 != math.prod(found.shape) * DTYPE_BITS[found.dtype]:
        raise ValueError(
            f"the tensor {quote(name)}: offsets {first} … {last} do not hold {found.dtype} of shape {found.shape}"
        )
    return TensorPlace(dtype=found.dtype, shape=found.shape, start=begin + first, end=begin + last)

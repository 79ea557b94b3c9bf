"""Rewrites where an ONNX graph finds its weights, so that a library reads the file that was hashed.

A graph's external data is a file name, which a library opens itself: whoever can rename files in the bundle's folder
can put another file there between the check and that moment. Two rewrites of the graph's bytes rule it out:

- `relocate` replaces the name by the path of an open descriptor (`/proc/self/fd/N`), for ONNX Runtime;
- `detach` turns weights into inputs of the graph, to be replaced by constants over a mapped file, for OpenVINO.

Both read the protocol buffers' wire format (protobuf.dev, Encoding), with the field numbers of onnx.proto, and refuse a
graph with external data that they would not rewrite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import BundleError

__all__ = ["Weights", "detach", "relocate"]

Weights = Mapping[str, NDArray[np.generic]]

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT = 5, 11
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA, _EXTERNAL, _DATA_LOCATION = 1, 2, 8, 9, 13, 14
# The messages that lead to a tensor: message → field → message.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_DTYPES = {1: "<f4", 2: "u1", 3: "i1", 10: "<f2"}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# Weights up to this size are written into the graph. OpenVINO computes with the scales of quantized layers while it
# reads a graph, which it cannot with inputs.
_INLINE_BYTES = 4096
_MOST_NESTED = 32


@dataclass(frozen=True)
class _External:
    """A tensor whose data is in the weights' file."""

    name: str
    data_type: int
    shape: tuple[int, ...]
    offset: int
    length: int


def relocate(graph: bytes, file_name: str, size: int, location: str) -> bytes:
    """Return a graph that finds its weights at another location.

    Args:
        graph: an ONNX model.
        file_name: of its weights, as it names them.
        size: of that file, in bytes.
        location: replaces the file's name.

    Raises:
        BundleError: the graph cannot be read, or has external data other than weights inside that file.
    """

    def replace(tensor: _External) -> bytes:
        return _tensor(tensor, _external(location, tensor))

    return _rewrite(graph, file_name, size, replace, lambda tensor: b"")


def detach(graph: bytes, file_name: str, stored: NDArray[np.uint8]) -> tuple[bytes, Weights]:
    """Return a graph without its weights, and the weights.

    Args:
        graph, file_name: as for `relocate`.
        stored: the bytes of the weights' file.

    Returns:
        The graph, with an input for each weight and small weights inside; and the weights of the inputs by name, which
        are views of `stored`.

    Raises:
        BundleError: as for `relocate`.
    """
    weights: dict[str, NDArray[np.generic]] = {}

    def keep_small(tensor: _External) -> bytes:
        if tensor.length > _INLINE_BYTES:
            return b""
        return _tensor(tensor, _field(_RAW_DATA, stored[tensor.offset : tensor.offset + tensor.length].tobytes()))

    def declare_large(tensor: _External) -> bytes:
        if tensor.length <= _INLINE_BYTES:
            return b""
        if tensor.name in weights:
            raise BundleError(f"a graph has two weights of the name {tensor.name!r}; export the bundle again")
        found = stored[tensor.offset : tensor.offset + tensor.length]
        weights[tensor.name] = found.view(_DTYPES[tensor.data_type]).reshape(tensor.shape)
        return _field(_GRAPH_INPUT, _value_info(tensor))

    return _rewrite(graph, file_name, stored.size, keep_small, declare_large), weights


def _rewrite(
    graph: bytes,
    file_name: str,
    size: int,
    initializer: Callable[[_External], bytes],
    added: Callable[[_External], bytes],
) -> bytes:
    """Rewrite each weight of a model.

    Args:
        initializer: returns a tensor that replaces a weight; b"" removes it.
        added: returns fields that are added to the graph for a weight.
    """
    found = 0

    def rewrite_graph(data: bytes) -> bytes:
        nonlocal found
        rewritten, more = list[bytes](), list[bytes]()
        for number, value, whole in _fields(data):
            tensor = _read_external(value, file_name, size) if number == _GRAPH_INITIALIZER else None
            if tensor is None:
                rewritten.append(whole)
                continue
            found += 1
            if replaced := initializer(tensor):
                rewritten.append(_field(_GRAPH_INITIALIZER, replaced))
            more.append(added(tensor))
        return b"".join((*rewritten, *more))

    try:
        whole_model = b"".join(
            _field(_MODEL_GRAPH, rewrite_graph(value)) if number == _MODEL_GRAPH else whole
            for number, value, whole in _fields(graph)
        )
        # External data elsewhere has a location, too. Only where the word occurs more often are all tensors looked at.
        if graph.count(b"location") != found:
            _refuse_others(graph, "model", file_name, 0)
    except (ValueError, IndexError, OverflowError) as error:
        raise BundleError(f"a graph is not an ONNX model that latentrt exports: {error}; export it again") from error
    return whole_model


def _refuse_others(data: bytes, message: str, file_name: str, depth: int) -> None:
    """Refuse external data anywhere but in the initializers of the model's own graph.

    Raises:
        BundleError: there is some. ValueError: the data is not such a message.
    """
    if depth > _MOST_NESTED:
        raise ValueError("it is nested too deeply")
    for number, value, _ in _fields(data):
        child = _CHILDREN[message].get(number)
        if child == "tensor":
            if not (depth == 1 and number == _GRAPH_INITIALIZER) and _is_external(value):
                raise BundleError(
                    f"a graph has external data in a node or a nested graph, expected all of it in {file_name}, as "
                    "weights of the graph; export the bundle again"
                )
        elif child is not None:
            _refuse_others(value, child, file_name, depth + 1)


def _is_external(tensor: bytes) -> bool:
    return any(
        number == _EXTERNAL or (number == _DATA_LOCATION and value != b"\0") for number, value, _ in _fields(tensor)
    )


def _read_external(data: bytes, file_name: str, size: int) -> _External | None:
    """Return a tensor whose data is in a file; None for one that is in the graph.

    Raises:
        BundleError: its data is not a weight in the file `file_name`. ValueError: it cannot be read.
    """
    dims, data_type, name, entries, external = list[int](), 0, "", list[tuple[str, str]](), False
    for number, value, whole in _fields(data):
        if number == _DIMS:
            dims += _read_dims(value, packed=whole[0] & 7 == _BYTES)
        elif number == _DATA_TYPE:
            data_type = _varint(value, 0)[0]
        elif number == _NAME:
            name = value.decode()
        elif number == _EXTERNAL:
            entries.append(_read_entry(value))
            external = True
        elif number == _DATA_LOCATION:
            external = external or _varint(value, 0)[0] != 0
    if not external:
        return None
    stored = dict(entries)
    if len(stored) != len(entries) or stored.keys() != {"location", "offset", "length"}:
        raise BundleError(
            f"the weight {name!r} of a graph has external data {entries}, expected location, offset, length"
        )
    if stored["location"] != file_name:
        raise BundleError(
            f"the weight {name!r} of a graph is in {stored['location']!r:.200}, expected {file_name}; export it again"
        )
    offset, length = _read_decimal(stored["offset"]), _read_decimal(stored["length"])
    if data_type not in _DTYPES:
        raise BundleError(f"the weight {name!r} of a graph has ONNX's data type {data_type}, expected {[*_DTYPES]}")
    if offset + length > size or length != math.prod(dims) * np.dtype(_DTYPES[data_type]).itemsize or length == 0:
        raise BundleError(
            f"the weight {name!r} of a graph has {length} bytes at {offset} of {file_name}, which has {size}, and the "
            f"shape {dims}; export the bundle again"
        )
    return _External(name, data_type, tuple(dims), offset, length)


def _read_dims(value: bytes, *, packed: bool) -> Iterator[int]:
    position = 0
    while position < len(value):
        size, position = _varint(value, position)
        if size >= 1 << 40:  # a negative number has 64 bits
            raise ValueError(f"a dimension of {size}")
        yield size
        if not packed:
            return


def _read_entry(data: bytes) -> tuple[str, str]:
    """Read a StringStringEntryProto."""
    texts = {number: value.decode() for number, value, _ in _fields(data)}
    return texts.get(1, ""), texts.get(2, "")


def _read_decimal(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"the number {text[:40]!r}")
    return int(text)


def _tensor(tensor: _External, data: bytes) -> bytes:
    """Return a TensorProto; `data` are the fields that hold or locate its values."""
    dims = b"".join(_key(_DIMS, _VARINT) + _encode_varint(size) for size in tensor.shape)
    data_type = _key(_DATA_TYPE, _VARINT) + _encode_varint(tensor.data_type)
    return dims + data_type + _field(_NAME, tensor.name.encode()) + data


def _external(location: str, tensor: _External) -> bytes:
    entries = (("location", location), ("offset", str(tensor.offset)), ("length", str(tensor.length)))
    encoded = [_field(_EXTERNAL, _field(1, key.encode()) + _field(2, value.encode())) for key, value in entries]
    return b"".join((*encoded, _key(_DATA_LOCATION, _VARINT), b"\1"))


def _value_info(tensor: _External) -> bytes:
    """Return a ValueInfoProto: name 1, type 2 (tensor 1 (element 1, shape 2 (dimension 1 (value 1))))."""
    dims = b"".join(_field(1, _key(1, _VARINT) + _encode_varint(size)) for size in tensor.shape)
    of_tensor = _key(1, _VARINT) + _encode_varint(tensor.data_type) + _field(2, dims)
    return _field(1, tensor.name.encode()) + _field(2, _field(1, of_tensor))


def _fields(data: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the number, the value and the whole encoding of each field of a message.

    Raises:
        ValueError, IndexError: the data ends within a field, or has a group, which ONNX does not use.
    """
    position, end = 0, len(data)
    while position < end:
        began = position
        key, position = _varint(data, position)
        wire = key & 7
        if wire == _BYTES:
            length, start = _varint(data, position)
        elif wire == _VARINT:
            start, length = position, _varint(data, position)[1] - position
        elif wire in (_FIXED32, _FIXED64):
            start, length = position, 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        position = start + length
        if position > end:
            raise ValueError("it ends within a field")
        yield key >> 3, data[start:position], data[began:position]


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return the number at a position, and the position behind it."""
    byte = data[position]
    if byte < 0x80:
        return byte, position + 1
    number, shift = byte & 0x7F, 7
    while byte >= 0x80:
        position += 1
        byte = data[position]
        number |= (byte & 0x7F) << shift
        shift += 7
        if shift > 70:
            raise ValueError("a number of more than ten bytes")
    return number, position + 1


def _encode_varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _key(number: int, wire: int) -> bytes:
    return _encode_varint(number << 3 | wire)


def _field(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _encode_varint(len(value)) + value

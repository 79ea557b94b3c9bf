"""Rewrites the references of an ONNX graph to its weights, so that a library reads the file that was hashed.

A graph's external data is a file name, which a library opens itself: whoever can rename files in the bundle's folder
can put another file there between the check and that moment. Two rewrites of the graph's bytes rule it out:

- `relocate` replaces the name by the path of an open descriptor (`/proc/self/fd/N`), for ONNX Runtime;
- `detach` turns weights into inputs of the graph, to be replaced by constants over a mapped file, for OpenVINO.

Both take a graph from `Bundle.read` only: they rewrite the initializers of the graph and check nothing.
`Bundle.read` has checked (`latentrt.bundle.graph_check`) that these are the only tensors outside the graph, each with a
name of its own and inside the component's own file of weights. Any other file that a graph named would be opened below
the folder `/` by ONNX Runtime, and below the current folder by OpenVINO.

Field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.onnx_graph import Tensor, read_tensor, read_varint
from latentrt.bundle.onnx_types import WEIGHT_DTYPES

__all__ = ["Weights", "detach", "relocate"]

Weights = Mapping[str, NDArray[np.generic]]

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT = 5, 11
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 1, 2, 8, 9, 13, 14
_EXTERNAL = 1  # TensorProto.DataLocation
_VARINT, _BYTES = 0, 2
_SHORT = [bytes([number]) for number in range(128)]
# Weights up to this size are written into the graph. OpenVINO computes with the scales of quantized layers while it
# reads a graph, which it cannot with inputs.
_INLINE_BYTES = 4096


def relocate(graph: bytes, location: str) -> bytes:
    """Return a graph that finds its weights at another location.

    Args:
        graph: the bytes of a component's graph, from `Bundle.read`.
        location: replaces the name of the weights' file.
    """

    place = _entry("location", location)

    def replace(weight: Tensor, offset: int) -> bytes:
        entries = place + _entry("offset", str(offset)) + _entry("length", str(weight.nbytes))
        return _initializer(weight, entries + _number(_DATA_LOCATION, _EXTERNAL))

    return _rewrite(graph, replace)


def detach(graph: bytes, stored: NDArray[np.uint8]) -> tuple[bytes, Weights]:
    """Return a graph without its weights, and the weights.

    Args:
        graph: as for `relocate`.
        stored: the bytes of the component's file of weights.

    Returns:
        The graph, with an input for each weight and small weights inside; and the weights of the inputs by name, which
        are views of `stored`.
    """
    weights: dict[str, NDArray[np.generic]] = {}

    def replace(weight: Tensor, offset: int) -> bytes:
        found = stored[offset : offset + weight.nbytes]
        if found.size <= _INLINE_BYTES:
            return _initializer(weight, _field(_RAW_DATA, found.tobytes()))
        weights[weight.name] = found.view(WEIGHT_DTYPES[weight.dtype]).reshape(weight.shape)
        return _field(_GRAPH_INPUT, _value_info(weight))

    return _rewrite(graph, replace), weights


def _rewrite(model: bytes, replace: Callable[[Tensor, int], bytes]) -> bytes:
    """Rewrite the weights of a model, and copy everything else.

    Args:
        replace: takes a weight and its first byte in the weights file; returns the field that replaces it in the graph.
    """

    def rewrite_graph(graph: bytes) -> Iterator[bytes]:
        for number, content, whole in _fields(graph):
            tensor = read_tensor(content) if number == _GRAPH_INITIALIZER else None
            external = None if tensor is None else tensor.external
            yield whole if tensor is None or external is None else replace(tensor, int(external.offset))

    return b"".join(
        _field(_MODEL_GRAPH, b"".join(rewrite_graph(content))) if number == _MODEL_GRAPH else whole
        for number, content, whole in _fields(model)
    )


def _fields(message: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the number, the content and the whole encoding of each field of a model or a graph.

    Both have numbers, texts and messages alone. The content of a number is empty.
    """
    at, end = 0, len(message)
    while at < end:
        began = at
        tag, at = read_varint(message, at)
        size, start = read_varint(message, at)
        at = start + size if tag & 7 == _BYTES else start
        yield tag >> 3, message[start:at], message[began:at]


def _initializer(weight: Tensor, data: bytes) -> bytes:
    """Return a weight as a field of the graph; `data` are the fields that hold or locate its values."""
    dims = b"".join([_number(_DIMS, size) for size in weight.shape])
    described = dims + _number(_DATA_TYPE, weight.dtype) + _field(_NAME, weight.name.encode())
    return _field(_GRAPH_INITIALIZER, described + data)


def _entry(key: str, text: str) -> bytes:
    """Return an entry of a tensor's external data."""
    return _field(_EXTERNAL_DATA, _field(1, key.encode()) + _field(2, text.encode()))


def _value_info(weight: Tensor) -> bytes:
    """Return a ValueInfoProto: name 1, type 2 (tensor 1 (element 1, shape 2 (dimension 1 (value 1))))."""
    dims = b"".join([_field(1, _number(1, size)) for size in weight.shape])
    return _field(1, weight.name.encode()) + _field(2, _field(1, _number(1, weight.dtype) + _field(2, dims)))


def _number(field: int, number: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(number)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    if number < 128:
        return _SHORT[number]
    encoded = bytearray()
    while number >= 128:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)

"""Writes ONNX graphs as bytes, right and wrong ones: a message is a list of (field number, value), in any order.

A value is a whole number, a text, bytes, a float (32 bits) or another message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from latentrt.bundle.tensors import TensorSpec

__all__ = [
    "DTYPES",
    "Message",
    "attribute",
    "constant",
    "encode",
    "external",
    "graph",
    "model",
    "node",
    "small_graph",
    "value",
    "varint",
]

Message = list[tuple[int, Any]]

DTYPES = {"float32": 1, "uint8": 2, "int64": 7, "bool": 9, "float16": 10}
_ATTRIBUTE_FIELDS: dict[type, tuple[int, int]] = {float: (2, 1), int: (3, 2), str: (4, 3), bytes: (4, 3)}


def varint(number: int) -> bytes:
    """Encode a number of 64 bits; a negative one as its complement."""
    number &= (1 << 64) - 1
    data = bytearray()
    while number > 127:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def encode(message: Iterable[tuple[int, Any]]) -> bytes:
    """Encode a message."""
    data = b""
    for number, content in message:
        if isinstance(content, int):
            data += varint(number << 3) + varint(content)
        elif isinstance(content, float):
            data += varint(number << 3 | 5) + struct.pack("<f", content)
        else:
            text = content.encode() if isinstance(content, str) else content
            body = text if isinstance(text, bytes) else encode(text)
            data += varint(number << 3 | 2) + varint(len(body)) + body
    return data


def value(name: str, dtype: int, shape: Sequence[int | str]) -> Message:
    """An input, output or value of a graph."""
    dims = [(1, [(1 if isinstance(size, int) else 2, size)]) for size in shape]
    return [(1, name), (2, [(1, [(1, dtype), (2, dims)])])]


def constant(name: str, dtype: int, shape: Sequence[int], raw: bytes) -> Message:
    """A tensor with its values."""
    return [*((1, size) for size in shape), (2, dtype), (8, name), (9, raw)]


def external(
    name: str, dtype: int, shape: Sequence[int], *, location: str | bytes, offset: str = "0", length: str = "4"
) -> Message:
    """A tensor whose values are in another file."""
    entries = (("location", location), ("offset", offset), ("length", length))
    return [
        *((1, size) for size in shape),
        (2, dtype),
        (8, name),
        *((13, [(1, key), (2, text)]) for key, text in entries),
        (14, 1),
    ]


def attribute(name: str, content: Any) -> Message:
    """An attribute: a float, a whole number, a text, a list of whole numbers, or a tensor (a message)."""
    if isinstance(content, list) and content and isinstance(content[0], tuple):
        return [(1, name), (5, content), (20, 4)]
    if isinstance(content, list):
        return [(1, name), *((8, each) for each in content), (20, 7)]
    field, kind = _ATTRIBUTE_FIELDS[type(content)]
    return [(1, name), (field, content), (20, kind)]


def node(
    op_type: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
) -> Message:
    """A node, named after its first output."""
    return [
        *((1, name) for name in inputs),
        *((2, name) for name in outputs),
        (3, f"{outputs[0]}/{op_type}"),
        (4, op_type),
        *((5, attribute(name, content)) for name, content in attributes.items()),
        *([(7, domain)] if domain else []),
    ]


def graph(
    nodes: Sequence[Message],
    initializers: Sequence[Message],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    values: Sequence[Message] = (),
) -> Message:
    """A graph with this signature."""
    return [
        *((1, each) for each in nodes),
        (2, "main_graph"),
        *((5, each) for each in initializers),
        *((11, value(spec.name, DTYPES[spec.dtype], spec.shape)) for spec in inputs),
        *((12, value(spec.name, DTYPES[spec.dtype], spec.shape)) for spec in outputs),
        *((13, each) for each in values),
    ]


def model(content: Message, *, ir_version: int = 10, opset: int = 21) -> Message:
    """A model of a graph."""
    return [(1, ir_version), (2, "latentrt"), (7, content), (8, [(1, ""), (2, opset)])]


def small_graph(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], weights: str, *, more: Sequence[Message] = ()
) -> bytes:
    """Return a graph with one weight of 4 bytes and this signature, of the small bundle's (`small_bundle`).

    Args:
        weights: the path of the weights file, which holds the weight at its beginning.
        more: further initializers.
    """
    nodes, constants = _BODIES[outputs[0].name](inputs[0].name, [spec.name for spec in outputs])
    weight = external("scale", DTYPES["float32"], [1], location=Path(weights).name)
    return encode(model(graph(nodes, [weight, *constants, *more], inputs, outputs)))


def _embed(tokens: str, outputs: list[str]) -> tuple[list[Message], list[Message]]:
    """A width of 4 for each token."""
    nodes = [
        node("Cast", [tokens], ["floats"], to=DTYPES["float32"]),
        node("Mul", ["floats", "scale"], ["scaled"]),
        node("Unsqueeze", ["scaled", "last"], ["one"]),
        node("Concat", ["one"] * 4, outputs, axis=-1),
    ]
    return nodes, [constant("last", DTYPES["int64"], [1], struct.pack("<q", -1))]


def _scale(latents: str, outputs: list[str]) -> tuple[list[Message], list[Message]]:
    return [node("Mul", [latents, "scale"], outputs)], []


def _decode(latents: str, outputs: list[str]) -> tuple[list[Message], list[Message]]:
    """Pixels of 8 times the size."""
    nodes = [
        node("Mul", [latents, "scale"], ["scaled"]),
        node("Slice", ["scaled", "zero", "three", "one"], ["colours"]),
        node("Resize", ["colours", "", "sides"], ["large"], mode="nearest"),
        node("Transpose", ["large"], ["floats"], perm=[0, 2, 3, 1]),
        node("Cast", ["floats"], outputs, to=DTYPES["uint8"]),
    ]
    numbers = (("zero", 0), ("one", 1), ("three", 3))
    return nodes, [
        *(constant(name, DTYPES["int64"], [1], struct.pack("<q", number)) for name, number in numbers),
        constant("sides", DTYPES["float32"], [4], struct.pack("<4f", 1, 1, 8, 8)),
    ]


def _classify(pixels: str, outputs: list[str]) -> tuple[list[Message], list[Message]]:
    """A score for each colour."""
    scores, special, flagged = outputs
    nodes = [
        node("Cast", [pixels], ["floats"], to=DTYPES["float32"]),
        node("ReduceMax", ["floats", "sides"], [scores], keepdims=0),
        node("Mul", [scores, "scale"], [special]),
        node("ReduceMax", [scores, "colours"], ["highest"], keepdims=0),
        node("Greater", ["highest", "scale"], [flagged]),
    ]
    return nodes, [
        constant("sides", DTYPES["int64"], [2], struct.pack("<2q", 1, 2)),
        constant("colours", DTYPES["int64"], [1], struct.pack("<q", 1)),
    ]


_BODIES = {"hidden_states": _embed, "noise_pred": _scale, "pixels": _decode, "concept_scores": _classify}

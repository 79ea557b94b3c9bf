"""Reads an ONNX graph from its bytes (protocol buffers), strictly and without the `onnx` package.

Parsers of protocol buffers pass over fields that they do not know, and merge a field that occurs twice, each in its own
way. So two of them can see two graphs in one file. This reader accepts only unambiguous files: the fields that the
exporter writes, each as often as it may occur, in the shortest encoding. Everything else is an error that names the
field: functions, subgraphs, training information, sparse or typed tensor data, quantization annotations.

Field numbers are those of `onnx.proto` (ONNX 1.21, IR version 10).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from latentrt.bundle.onnx_types import ELEMENT_TYPES
from latentrt.bundle.printable import quote
from latentrt.bundle.tensors import MAX_AXES

__all__ = [
    "MAX_GRAPH_BYTES",
    "Attribute",
    "ExternalData",
    "GraphFormatError",
    "Node",
    "OnnxGraph",
    "Tensor",
    "TensorType",
    "read_graph",
    "read_tensor",
    "read_varint",
]

# The denoiser of Stable Diffusion XL has about 4 MB; a graph beyond this is not read at all.
MAX_GRAPH_BYTES = 32 << 20
# Longest name of a node or a tensor; names are paths of modules.
_MAX_NAME_BYTES = 1024
# Nodes of a graph, and as many tensors; many times those of a denoiser.
_MAX_NODES = 50_000
# Inputs of all nodes together; graphs of the exporter have about two for each node.
_MAX_NODE_INPUTS = 200_000
_FEW = 64  # inputs, outputs or attributes of a node
# The body of Stable Diffusion XL's denoiser takes 140 keys and values.
_MAX_GRAPH_INPUTS = 512

_T = TypeVar("_T")


class GraphFormatError(ValueError):
    """A fault of a graph. The message is a predicate, whose subject is the file's name."""


@dataclass(frozen=True, slots=True)
class TensorType:
    """An element type (TensorProto.DataType) and a shape: numbers, names of axes, or None for an unknown size.

    The shape is None where the rank is unknown.
    """

    dtype: int
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True)
class ExternalData:
    """The place of a tensor's values in another file, as the graph's own texts."""

    location: str
    offset: str
    length: str


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a graph or an attribute: its values as bytes, or their place in another file; one of both is None."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    raw: bytes | None
    external: ExternalData | None

    @property
    def nbytes(self) -> int:
        """The number of bytes of the values."""
        return math.prod(self.shape) * ELEMENT_TYPES[self.dtype].itemsize


Attribute = float | int | bytes | tuple[int, ...] | Tensor


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. An input or an output that is left out has an empty name."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]


@dataclass(frozen=True, slots=True)
class OnnxGraph:
    """A graph.

    Attributes:
        opsets: version of each operator domain.
        inputs, outputs, value_info: types by name, in the order of the file.
    """

    ir_version: int
    opsets: Mapping[str, int]
    nodes: tuple[Node, ...]
    initializers: Mapping[str, Tensor]
    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    value_info: Mapping[str, TensorType]


def read_graph(data: bytes) -> OnnxGraph:
    """Read a graph.

    Raises:
        GraphFormatError: it is too large, truncated, no ONNX graph, or holds something that the exporter never writes.
    """
    if len(data) > MAX_GRAPH_BYTES:
        raise GraphFormatError(f"has {len(data):,} bytes, expected at most {MAX_GRAPH_BYTES:,}")
    return _Reader().model(data)


def read_tensor(data: bytes, owner: str = "initializer") -> Tensor:
    """Read one tensor of a graph.

    Args:
        owner: describes the tensor in an error.

    Raises:
        GraphFormatError: it is not a tensor as the exporter writes them.
    """
    found = _read(data, _TENSOR, owner)
    name = _text(found.get("name", [b""])[0], f"the name of {owner}")
    owner = f"{owner} {quote(name)}".strip()
    dtype, shape = _element_type(found.get("data_type", [0])[0], owner), tuple(found.get("dims", ()))
    if any(not 0 <= size < 1 << 40 for size in shape):
        raise GraphFormatError(f"has {owner} of shape {list(shape)}, expected sizes from 0")
    external = _external_data(found["external_data"], owner) if "external_data" in found else None
    raw: bytes | None = found["raw_data"][0] if "raw_data" in found else None
    location = found.get("data_location", [0])[0]
    if (raw is None) == (external is None) or location != (_EXTERNAL if external is not None else 0):
        raise GraphFormatError(
            f"has {owner} with data_location {location}, {'no ' if raw is None else ''}raw data and "
            f"{'no ' if external is None else ''}external data, expected one of the two, and the location to say which"
        )
    tensor = Tensor(name, dtype, shape, raw, external)
    if raw is not None and len(raw) != tensor.nbytes:
        raise GraphFormatError(
            f"has {owner} with {len(raw):,} bytes of raw data, expected {tensor.nbytes:,} for its shape {list(shape)}"
        )
    return tensor


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, unsigned, and the place behind it.

    Raises:
        GraphFormatError: it has more than 64 bits, or a longer form than it needs.
        IndexError: the data ends within it.
    """
    value, shift = data[at], 7
    at += 1
    if value < 128:  # as nearly all are
        return value, at
    value &= 127
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            if value >> 64 or byte == 0:
                raise GraphFormatError("has a number that is not in its shortest form of 64 bits, expected only those")
            return value, at
        shift += 7
        if shift > 63:
            raise GraphFormatError("has a number of more than 64 bits: it is not an ONNX graph")


@dataclass(frozen=True, slots=True)
class _Message:
    """A kind of message.

    Attributes:
        name: with its article.
        fields: tag (number · 8 + wire type) → name and largest number of occurrences.
        refused: names of further fields of the format, by number, for messages.
    """

    name: str
    fields: Mapping[int, tuple[str, int]]
    refused: Mapping[int, str]


def _message(name: str, fields: Mapping[str, tuple[int, int, int]], **refused: int) -> _Message:
    """Describe a kind of message.

    Args:
        fields: name → number, wire type, largest number of occurrences.
        refused: name → number.
    """
    return _Message(
        name,
        {number << 3 | wire: (field, most) for field, (number, wire, most) in fields.items()},
        {number: field for field, number in refused.items()},
    )


_VARINT, _BYTES, _FLOAT32 = 0, 2, 5

_MODEL = _message(
    "a model",
    {
        "ir_version": (1, _VARINT, 1),
        "producer_name": (2, _BYTES, 1),
        "producer_version": (3, _BYTES, 1),
        "graph": (7, _BYTES, 1),
        "opset_import": (8, _BYTES, 8),
    },
    domain=4,
    model_version=5,
    doc_string=6,
    metadata_props=14,
    training_info=20,
    functions=25,
    configuration=26,
)
_OPSET = _message("an operator set", {"domain": (1, _BYTES, 1), "version": (2, _VARINT, 1)})
_GRAPH = _message(
    "a graph",
    {
        "node": (1, _BYTES, _MAX_NODES),
        "name": (2, _BYTES, 1),
        "initializer": (5, _BYTES, _MAX_NODES),
        "input": (11, _BYTES, _MAX_GRAPH_INPUTS),
        "output": (12, _BYTES, 1024),
        "value_info": (13, _BYTES, 4 * _MAX_NODES),
    },
    doc_string=10,
    quantization_annotation=14,
    sparse_initializer=15,
    metadata_props=16,
)
_NODE = _message(
    "a node",
    {
        "input": (1, _BYTES, _FEW),
        "output": (2, _BYTES, _FEW),
        "name": (3, _BYTES, 1),
        "op_type": (4, _BYTES, 1),
        "attribute": (5, _BYTES, _FEW),
        "domain": (7, _BYTES, 1),
    },
    doc_string=6,
    overload=8,
    metadata_props=9,
    device_configurations=10,
)
_ATTRIBUTE = _message(
    "an attribute",
    {
        "name": (1, _BYTES, 1),
        "f": (2, _FLOAT32, 1),
        "i": (3, _VARINT, 1),
        "s": (4, _BYTES, 1),
        "t": (5, _BYTES, 1),
        "ints": (8, _VARINT, _FEW),
        "type": (20, _VARINT, 1),
    },
    g=6,
    floats=7,
    strings=9,
    tensors=10,
    graphs=11,
    doc_string=13,
    tp=14,
    type_protos=15,
    ref_attr_name=21,
    sparse_tensor=22,
    sparse_tensors=23,
)
_TENSOR = _message(
    "a tensor",
    {
        "dims": (1, _VARINT, MAX_AXES),
        "data_type": (2, _VARINT, 1),
        "name": (8, _BYTES, 1),
        "raw_data": (9, _BYTES, 1),
        "external_data": (13, _BYTES, 8),
        "data_location": (14, _VARINT, 1),
    },
    segment=3,
    float_data=4,
    int32_data=5,
    string_data=6,
    int64_data=7,
    double_data=10,
    uint64_data=11,
    doc_string=12,
    metadata_props=16,
)
_ENTRY = _message("an entry", {"key": (1, _BYTES, 1), "value": (2, _BYTES, 1)})
_VALUE_INFO = _message(
    "a value",
    # The tracer's notes on a value (metadata_props) are passed over, as every backend does.
    {"name": (1, _BYTES, 1), "type": (2, _BYTES, 1), "metadata_props": (4, _BYTES, _FEW)},
    doc_string=3,
)
_TYPE = _message(
    "a type",
    {"tensor_type": (1, _BYTES, 1)},
    sequence_type=4,
    map_type=5,
    denotation=6,
    opaque_type=7,
    sparse_tensor_type=8,
    optional_type=9,
)
_TENSOR_TYPE = _message("a tensor type", {"elem_type": (1, _VARINT, 1), "shape": (2, _BYTES, 1)})
_SHAPE = _message("a shape", {"dim": (1, _BYTES, MAX_AXES)})
_DIM = _message("a dimension", {"dim_value": (1, _VARINT, 1), "dim_param": (2, _BYTES, 1)}, denotation=3)

# AttributeProto.AttributeType → the one field that holds such a value.
_ATTRIBUTE_FIELDS = {1: "f", 2: "i", 3: "s", 4: "t", 7: "ints"}
_EXTERNAL = 1  # TensorProto.DataLocation


class _Reader:
    """Reads one graph. Most attributes and types occur many times in it, and equal bytes are read once."""

    def __init__(self) -> None:
        self._attributes: dict[bytes, tuple[str, Attribute]] = {}
        self._types: dict[bytes, TensorType] = {}

    def model(self, data: bytes) -> OnnxGraph:
        found = _read(data, _MODEL)
        if "graph" not in found or "ir_version" not in found or "opset_import" not in found:
            raise GraphFormatError("is not an ONNX model, expected its version, its operator sets and a graph")
        opsets: dict[str, int] = {}
        for entry in found["opset_import"]:
            opset = _read(entry, _OPSET)
            domain = _text(opset.get("domain", [b""])[0], "the domain of an operator set")
            if domain in opsets:
                raise GraphFormatError(f"imports the operators of {quote(domain)} twice, expected once")
            opsets[domain] = opset.get("version", [0])[0]
        for producer in ("producer_name", "producer_version"):
            _text(found.get(producer, [b""])[0], producer)
        graph = _read(found["graph"][0], _GRAPH)
        _text(graph.get("name", [b""])[0], "the graph's name")
        nodes = tuple(map(self._node, graph.get("node", [])))
        if (count := sum(len(each.inputs) for each in nodes)) > _MAX_NODE_INPUTS:
            raise GraphFormatError(f"has {count:,} inputs of nodes, expected at most {_MAX_NODE_INPUTS:,}")
        return OnnxGraph(
            ir_version=found["ir_version"][0],
            opsets=opsets,
            nodes=nodes,
            initializers=_by_name(
                "initializer", ((each.name, each) for each in map(read_tensor, graph.get("initializer", [])))
            ),
            inputs=self._values(graph.get("input", []), "input"),
            outputs=self._values(graph.get("output", []), "output"),
            value_info=self._values(graph.get("value_info", []), "value"),
        )

    def _node(self, data: bytes) -> Node:
        found = _read(data, _NODE)
        name = _text(found.get("name", [b""])[0], "a node's name")
        owner = f"node {quote(name)}"
        attributes: dict[str, Attribute] = {}
        for each in found.get("attribute", ()):
            known = self._attributes.get(each)
            if known is None:
                known = self._attributes[each] = self._attribute(each, owner)
            if known[0] in attributes:
                raise GraphFormatError(f"has the attribute {quote(known[0])} of {owner} twice, expected it once")
            attributes[known[0]] = known[1]
        return Node(
            name,
            _text(found.get("op_type", [b""])[0], "the operator", owner),
            _text(found.get("domain", [b""])[0], "the domain", owner),
            tuple([_text(each, "an input", owner) for each in found.get("input", ())]),
            tuple([_text(each, "an output", owner) for each in found.get("output", ())]),
            attributes,
        )

    def _attribute(self, data: bytes, owner: str) -> tuple[str, Attribute]:
        found = _read(data, _ATTRIBUTE, owner)
        name = _text(found.pop("name", [b""])[0], "the name of an attribute", owner)
        kind = found.pop("type", [0])[0]
        field = _ATTRIBUTE_FIELDS.get(kind)
        # A list may be empty. Any other value must be there, and nothing beside it.
        if field is None or (set(found) != {field} and (field != "ints" or found)):
            raise GraphFormatError(
                f"has the attribute {quote(name)} of {owner} with type {kind} and {sorted(found)}, expected one value "
                "of that type: a number, whole numbers, a text or a tensor"
            )
        if field == "ints":
            return name, tuple(found.get("ints", ()))
        value = found[field][0]
        if field == "f":
            return name, float(struct.unpack("<f", value)[0])
        if field != "t":
            return name, value
        tensor = read_tensor(value, f"the attribute {quote(name)} of {owner}")
        if tensor.external is not None or tensor.nbytes > 8:
            raise GraphFormatError(f"has a tensor in the attribute {quote(name)} of {owner}, expected one number")
        return name, tensor

    def _values(self, items: list[bytes], kind: str) -> dict[str, TensorType]:
        return _by_name(kind, (self._value(each, kind) for each in items))

    def _value(self, data: bytes, kind: str) -> tuple[str, TensorType]:
        found = _read(data, _VALUE_INFO)
        name = _text(found.get("name", [b""])[0], f"the name of an {kind}")
        if "type" not in found:
            raise GraphFormatError(f"has the {kind} {quote(name)} without a type, expected one")
        described = found["type"][0]
        known = self._types.get(described)
        if known is None:
            known = self._types[described] = _type(described, f"the {kind} {quote(name)}")
        return name, known


def _by_name(kind: str, pairs: Iterable[tuple[str, _T]]) -> dict[str, _T]:
    """Return values by their names; reject an empty or repeated name. `kind` describes the values in the error."""
    values: dict[str, _T] = {}
    for name, value in pairs:
        if not name or name in values:
            raise GraphFormatError(f"has the {kind} {quote(name)} twice or without a name, expected a name of its own")
        values[name] = value
    return values


def _external_data(entries: list[bytes], owner: str) -> ExternalData:
    values: dict[str, str] = {}
    for entry in entries:
        found = _read(entry, _ENTRY, owner)
        key = _text(found.get("key", [b""])[0], "a key of the external data", owner)
        if key in values:
            raise GraphFormatError(f"has the external data of {owner} with {quote(key)} twice, expected it once")
        values[key] = _text(found.get("value", [b""])[0], f"the {quote(key)} of the external data of {owner}")
    if set(values) != {"location", "offset", "length"}:
        raise GraphFormatError(
            f"has the external data of {owner} with {', '.join(map(quote, values))}; expected location, offset and "
            "length"
        )
    return ExternalData(**values)


def _element_type(code: int, owner: str) -> int:
    """Return a code of `onnx_types.ELEMENT_TYPES`; reject any other."""
    if code not in ELEMENT_TYPES:
        raise GraphFormatError(f"has {owner} of data type {code}, expected one of {sorted(ELEMENT_TYPES)}")
    return code


def _type(data: bytes, owner: str) -> TensorType:
    found = _read(data, _TYPE, owner)
    if "tensor_type" not in found:
        raise GraphFormatError(f"has {owner} without a tensor type, expected one")
    tensor = _read(found["tensor_type"][0], _TENSOR_TYPE, owner)
    dtype = _element_type(tensor.get("elem_type", [0])[0], owner)
    if "shape" not in tensor:
        return TensorType(dtype, None)
    shape: list[int | str | None] = []
    for each in _read(tensor["shape"][0], _SHAPE, owner).get("dim", ()):
        dim = _read(each, _DIM, owner)
        if len(dim) > 1 or dim.get("dim_value", [1])[0] < 0:
            raise GraphFormatError(f"has {owner} with the dimension {dim}, expected a number from 0, or a name")
        if "dim_param" in dim:
            shape.append(_text(dim["dim_param"][0], f"an axis of {owner}"))
        else:
            shape.append(dim["dim_value"][0] if dim else None)
    return TensorType(dtype, tuple(shape))


def _read(data: bytes, message: _Message, owner: str = "") -> dict[str, list[Any]]:
    """Return the values of a message's fields, by name: whole numbers, or the bytes of texts, floats and messages.

    Raises:
        GraphFormatError: the message is truncated, has a field that is not allowed, or one of them too often.
    """
    fields, found = message.fields, dict[str, list[Any]]()
    at, end = 0, len(data)
    value: Any
    try:
        while at < end:
            tag = data[at]
            at += 1
            if tag > 127:
                tag, at = read_varint(data, at - 1)
            entry = fields.get(tag)
            if entry is None:
                raise GraphFormatError(_describe_refused(tag, message, owner))
            kind = tag & 7
            if kind == _FLOAT32:
                size = 4
            else:
                size = data[at]
                at += 1
                if size > 127:
                    size, at = read_varint(data, at - 1)
            if kind == _VARINT:
                value = size if size < 1 << 63 else size - (1 << 64)
            else:
                value = data[at : at + size]
                at += size
                if at > end:
                    raise IndexError
            name, most = entry
            if name not in found:
                found[name] = [value]
            elif len(found[name]) < most:
                found[name].append(value)
            else:
                times = "once" if most == 1 else f"at most {most:,} times"
                raise GraphFormatError(f"repeats {name} in {message.name}{_of(owner)}, expected it {times}")
    except IndexError:
        raise GraphFormatError(
            f"ends inside {message.name}{_of(owner)}: it is truncated, or not an ONNX graph"
        ) from None
    return found


def _describe_refused(tag: int, message: _Message, owner: str) -> str:
    number, wire = tag >> 3, tag & 7
    names = {each >> 3: field for each, (field, _) in message.fields.items()} | dict(message.refused)
    if number not in names:
        return f"has the unknown field {number} in {message.name}{_of(owner)}: it is not an ONNX graph of latentrt"
    how = f" in the wire type {wire}" if number not in message.refused else ""
    return f"has {names[number]}{how} in {message.name}{_of(owner)}, which the exporter never writes"


def _of(owner: str) -> str:
    return f" of {owner}" if owner else ""


def _text(data: bytes, title: str, owner: str = "") -> str:
    """Return a text; `title` and `owner` describe it in an error."""
    if len(data) > _MAX_NAME_BYTES:
        raise GraphFormatError(
            f"has {title}{_of(owner)} with {len(data):,} bytes, expected at most {_MAX_NAME_BYTES:,}"
        )
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise GraphFormatError(f"has {title}{_of(owner)} that is not UTF-8, expected UTF-8") from None
    if "\0" in text:
        raise GraphFormatError(f"has {title}{_of(owner)} with a zero byte, expected none")
    return text

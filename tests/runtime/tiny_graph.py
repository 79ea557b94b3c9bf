"""An ONNX graph of one addition, encoded here, so that tests need no onnx: `out = in + weight + bias`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.graph_weights import _encode_varint, _field, _key
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import encode_manifest
from tests.runtime import small_bundle

COMPONENT, GRAPH, WEIGHTS = "unet", "unet/model.onnx", "unet/model.safetensors"
SHAPE = (4, 32, 32)  # large enough not to be written into the graph
SIZE = int(np.prod(SHAPE))
_START = 256


def number(field: int, value: int) -> bytes:
    return _key(field, 0) + _encode_varint(value)


def entry(key: str, value: str) -> bytes:
    return _field(13, _field(1, key.encode()) + _field(2, value.encode()))


def tensor(name: str, shape: tuple[int, ...], entries: dict[str, str], data_type: int = 1) -> bytes:
    """Return a TensorProto whose data is external."""
    encoded = [*(number(1, size) for size in shape), number(2, data_type), _field(8, name.encode())]
    return b"".join([*encoded, *(entry(*each) for each in entries.items()), number(14, 1)])


def located(offset: int, length: int, location: str = "model.safetensors") -> dict[str, str]:
    return {"location": location, "offset": str(offset), "length": str(length)}


def value(name: str) -> bytes:
    """Return a ValueInfoProto of float32, (batch, 4, 32, 32)."""
    batch = _field(1, _field(2, b"batch"))
    dims = b"".join([batch, *(_field(1, number(1, size)) for size in SHAPE)])
    return _field(1, name.encode()) + _field(2, _field(1, number(1, 1) + _field(2, dims)))


def node(op: str, inputs: list[str], output: str, attribute: bytes = b"") -> bytes:
    names = b"".join(_field(1, each.encode()) for each in inputs)
    return _field(1, names + _field(2, output.encode()) + _field(4, op.encode()) + attribute)


def model(*graph_fields: bytes) -> bytes:
    """Return a ModelProto of opset 17."""
    graph = b"".join([*graph_fields, _field(2, b"tiny")])
    return number(1, 8) + _field(7, graph) + _field(8, number(2, 17))


def addition(operation: str = "Add") -> bytes:
    """Return the graph's file."""
    return model(
        node(operation, ["in", "weight"], "sum"),
        node("Add", ["sum", "bias"], "out"),
        _field(5, tensor("weight", SHAPE, located(_START, 4 * SIZE))),
        _field(5, tensor("bias", (1,), located(_START + 4 * SIZE, 4))),
        _field(11, value("in")),
        _field(12, value("out")),
    )


def stored(weight: float, bias: float = 0.5) -> bytes:
    """Return the weights' file."""
    entries = {
        "weight": {"dtype": "F32", "shape": SHAPE, "data_offsets": [0, 4 * SIZE]},
        "bias": {"dtype": "F32", "shape": [1], "data_offsets": [4 * SIZE, 4 * SIZE + 4]},
    }
    header = json.dumps(entries).encode().ljust(_START - 8)
    values = np.array([*[weight] * SIZE, bias], "<f4")
    return len(header).to_bytes(8, "little") + header + values.tobytes()


def feeds() -> dict[str, NDArray[np.float32]]:
    return {"in": np.ones((1, *SHAPE), np.float32)}


def write_bundle(folder: Path) -> Bundle:
    """Write a bundle whose denoiser is the graph; its output for `feeds` is 1 + 2 + 0.5 everywhere."""
    small_bundle.write_bundle(folder)
    (folder / GRAPH).write_bytes(addition())
    (folder / WEIGHTS).write_bytes(stored(2))
    (folder / "bundle.json").write_bytes(encode_manifest(small_bundle.manifest(folder)))
    return Bundle.open(folder)

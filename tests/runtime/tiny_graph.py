"""A small bundle whose text encoder backends can run: `hidden_states = weight[input_ids] + bias`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import encode_manifest
from tests.runtime import small_bundle
from tests.runtime.onnx_writer import encode, external, graph, model, node

COMPONENT, GRAPH, WEIGHTS = "text_encoder", "text_encoder/model.onnx", "text_encoder/model.safetensors"
SHAPE = (49408, 4)  # of `weight`, which is too large to be written into the graph
SIZE = 49408 * 4
START = 256  # of `weight` in the weights' file, in bytes; `bias` follows
_, INPUTS, OUTPUTS = small_bundle.SIGNATURES[COMPONENT]


def addition(operation: str = "Add") -> bytes:
    """Return the graph's file."""
    file = Path(WEIGHTS).name
    weights = [
        external("weight", 1, SHAPE, location=file, offset=str(START), length=str(4 * SIZE)),
        external("bias", 1, [1], location=file, offset=str(START + 4 * SIZE), length="4"),
    ]
    nodes = [
        node("Gather", ["weight", "input_ids"], ["embedding"], axis=0),
        node(operation, ["embedding", "bias"], ["hidden_states"]),
    ]
    return encode(model(graph(nodes, weights, INPUTS, OUTPUTS)))


def stored(weight: float, bias: float = 0.5) -> bytes:
    """Return the weights' file."""
    entries = {
        "weight": {"dtype": "F32", "shape": SHAPE, "data_offsets": [0, 4 * SIZE]},
        "bias": {"dtype": "F32", "shape": [1], "data_offsets": [4 * SIZE, 4 * SIZE + 4]},
    }
    header = json.dumps(entries).encode().ljust(START - 8)
    values = np.array([*[weight] * SIZE, bias], "<f4")
    return len(header).to_bytes(8, "little") + header + values.tobytes()


def feeds() -> dict[str, NDArray[np.int64]]:
    return {"input_ids": np.ones((1, 77), np.int64)}


def write_bundle(folder: Path) -> Bundle:
    """Write a bundle whose text encoder is the graph; its output for `feeds` is 2 + 0.5 everywhere."""
    small_bundle.write_bundle(folder)
    (folder / GRAPH).write_bytes(addition())
    (folder / WEIGHTS).write_bytes(stored(2))
    (folder / "bundle.json").write_bytes(encode_manifest(small_bundle.manifest(folder)))
    return Bundle.open(folder)

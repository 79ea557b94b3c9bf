"""Builds graphs of a few nodes from text, and runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt_export.graphs.onnxruntime_cpu import Graph

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


def small_graph(
    text: str, *, own: tuple[str, ...] = (), weights: Mapping[str, NDArray[np.float32]] | None = None
) -> ir.Model:
    """Build a model from ONNX's text form, with inferred types and with nodes named `block/value` after their output.

    Args:
        text: the graph, without its header.
        own: outputs of nodes that belong to no module of a checkpoint; these nodes are named `/value`.
        weights: inputs of the text that become initializers.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(HEADER + text), strict_mode=True)
    model = ir.from_proto(proto)
    for node in model.graph:
        output = node.outputs[0].name
        node.name = f"/{output}" if output in own else f"block/{output}"
    for name, array in (weights or {}).items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=name)
        model.graph.initializers[name] = value
    return model


def operators(model: ir.Model) -> list[str]:
    """Return the operators of a graph in order."""
    return [node.op_type for node in model.graph]


def run(model: ir.Model, folder: Path, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Check a model and run it with ONNX Runtime."""
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    ir.save(model, folder / "model.onnx")
    return Graph(folder / "model.onnx").run(feeds)

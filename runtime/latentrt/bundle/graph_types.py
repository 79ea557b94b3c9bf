"""The element types of all tensors of an ONNX graph, of the operators that `latentrt.bundle.graph_shapes` knows."""

from __future__ import annotations

from collections.abc import Mapping

from latentrt.bundle.onnx_graph import GraphFormatError, Node, OnnxGraph, Tensor
from latentrt.bundle.onnx_types import CODES, ELEMENT_TYPES

__all__ = ["infer_types"]


def infer_types(graph: OnnxGraph) -> dict[str, int]:
    """Return the element type (TensorProto.DataType) of every tensor.

    Args:
        graph: its nodes in an order in which they can run.

    Raises:
        GraphFormatError: a node lacks the input from which its output has its type, or casts to a type that the
            exporter never writes.
    """
    types = {name: each.dtype for name, each in graph.initializers.items()}
    types.update({name: each.dtype for name, each in graph.inputs.items()})
    for node in graph.nodes:
        for index, name in enumerate(node.outputs):
            try:
                found = _output_type(node, index, types)
            except (IndexError, KeyError):
                raise GraphFormatError(
                    f"has node '{node.name}' with the inputs {list(node.inputs)}, expected those of {node.op_type}"
                ) from None
            if not isinstance(found, int) or found not in ELEMENT_TYPES:
                raise GraphFormatError(
                    f"has node '{node.name}', which makes data type {found}, expected one of {sorted(ELEMENT_TYPES)}"
                )
            types[name] = found
    return types


def _output_type(node: Node, index: int, types: Mapping[str, int]) -> object:
    match node.op_type:
        case "Cast":
            return node.attributes.get("to")
        case "Shape" | "ArgMax":
            return CODES["int64"]
        case "Equal" | "Greater" | "Less":
            return CODES["bool"]
        case "TopK" if index == 1:
            return CODES["int64"]
        case "Where" | "DequantizeLinear":
            return types[node.inputs[1]]
        case "QuantizeLinear":
            return types[node.inputs[2]] if any(node.inputs[2:]) else CODES["uint8"]
        case "ConstantOfShape":
            value = node.attributes.get("value")
            return value.dtype if isinstance(value, Tensor) else CODES["float32"]
    return types[node.inputs[0]]

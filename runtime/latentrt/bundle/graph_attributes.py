"""The attributes that each operator of a graph may have, with their types or their only values.

Backends differ in what they do with an attribute that they do not know, and some attributes change what an operator
returns: `output_shape` sets the size of a ConvTranspose, whatever its other attributes say. So a node may only have
those that the rules of `latentrt.bundle.graph_shapes` know, or that change neither sizes nor what is read.

Source: the ONNX operators of opset 21, and `MultiHeadAttention` of ONNX Runtime's `com.microsoft`.
"""

from __future__ import annotations

from collections.abc import Mapping

from latentrt.bundle.onnx_graph import Attribute, GraphFormatError, Node, Tensor
from latentrt.bundle.printable import quote

__all__ = ["ATTRIBUTES", "Expected", "check_attributes"]

Expected = type | tuple[int | bytes, ...]
"""The type of an attribute's value, or all values that it may have."""

_NAMES = {int: "a whole number", float: "a number", tuple: "whole numbers", Tensor: "a tensor"}

_WINDOW: Mapping[str, Expected] = {
    "auto_pad": (b"NOTSET",),
    "dilations": tuple,
    "kernel_shape": tuple,
    "pads": tuple,
    "strides": tuple,
}
_REDUCE = {"keepdims": int, "noop_with_empty_axes": int}
_QUANTIZE: Mapping[str, Expected] = {"axis": int, "block_size": (0,)}

ATTRIBUTES: Mapping[str, Mapping[str, Expected]] = {
    "ArgMax": {"axis": int, "keepdims": int, "select_last_index": (0,)},
    "BatchNormalization": {"epsilon": float, "momentum": float, "training_mode": (0,)},
    "Cast": {"to": int},
    "Concat": {"axis": int},
    "ConstantOfShape": {"value": Tensor},
    "Conv": {**_WINDOW, "group": int},
    "ConvTranspose": {**_WINDOW, "group": int, "output_padding": tuple},
    "DequantizeLinear": _QUANTIZE,
    "Gather": {"axis": int},
    "GatherElements": {"axis": int},
    "GatherND": {"batch_dims": int},
    "Gelu": {"approximate": (b"none", b"tanh")},
    "Gemm": {"alpha": float, "beta": float, "transA": (0, 1), "transB": (0, 1)},
    "GroupNormalization": {"epsilon": float, "num_groups": int, "stash_type": (1,)},
    "LayerNormalization": {"axis": int, "epsilon": float, "stash_type": (1,)},
    "LeakyRelu": {"alpha": float},
    "MaxPool": {**_WINDOW, "ceil_mode": (0,), "storage_order": (0,)},
    "MultiHeadAttention": {"num_heads": int, "scale": float},
    "Pad": {"mode": (b"constant", b"reflect")},
    "QuantizeLinear": {**_QUANTIZE, "output_dtype": (0,), "saturate": (1,)},
    "ReduceL2": _REDUCE,
    "ReduceMax": _REDUCE,
    "ReduceMean": _REDUCE,
    "ReduceSum": _REDUCE,
    "Reshape": {"allowzero": (0, 1)},
    "Resize": {
        "antialias": (0, 1),
        "axes": tuple,
        "coordinate_transformation_mode": (b"align_corners", b"asymmetric", b"half_pixel", b"pytorch_half_pixel"),
        "cubic_coeff_a": float,
        "exclude_outside": (0,),
        "extrapolation_value": float,
        "keep_aspect_ratio_policy": (b"stretch",),
        "mode": (b"cubic", b"linear", b"nearest"),
        "nearest_mode": (b"ceil", b"floor", b"round_prefer_ceil", b"round_prefer_floor"),
    },
    "ScatterElements": {"axis": int, "reduction": (b"none",)},
    "ScatterND": {"reduction": (b"none",)},
    "Shape": {"end": int, "start": int},
    "Softmax": {"axis": int},
    "Split": {"axis": int, "num_outputs": int},
    "TopK": {"axis": int, "largest": (0, 1), "sorted": (0, 1)},
    "Transpose": {"perm": tuple},
}
"""By operator. Operators that are not listed have none."""


def check_attributes(node: Node) -> None:
    """Reject an attribute that the node's operator may not have, or whose value it may not have.

    Raises:
        GraphFormatError: the message names the node, the attribute and what is expected.
    """
    allowed = ATTRIBUTES.get(node.op_type, {})
    for name, value in node.attributes.items():
        expected = allowed.get(name)
        if expected is None:
            raise GraphFormatError(
                f"has node {quote(node.name)} with the attribute {quote(name)}, expected of {node.op_type} "
                f"{', '.join(allowed) or 'none'}"
            )
        if not _fits(value, expected):
            raise GraphFormatError(
                f"has node {quote(node.name)} with {name} = {_describe(value)}, expected {_describe_expected(expected)}"
            )


def _fits(value: Attribute, expected: Expected) -> bool:
    if isinstance(expected, type):
        return isinstance(value, expected)
    return any(type(value) is type(each) and value == each for each in expected)


def _describe(value: Attribute) -> str:
    if isinstance(value, bytes):
        return quote(value.decode("utf-8", "backslashreplace"))
    return "a tensor" if isinstance(value, Tensor) else quote(value)


def _describe_expected(expected: Expected) -> str:
    return _NAMES[expected] if isinstance(expected, type) else " or ".join(map(_describe, expected))

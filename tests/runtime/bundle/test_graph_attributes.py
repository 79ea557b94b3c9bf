"""Attributes that change what an operator returns, or that backends read differently, are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest

from latentrt.bundle.graph_attributes import ATTRIBUTES, check_attributes
from latentrt.bundle.graph_shapes import OPERATORS
from latentrt.bundle.onnx_graph import GraphFormatError, Node, Tensor, read_graph
from latentrt.bundle.tensors import TensorSpec
from tests.runtime.onnx_writer import constant, encode, graph, model, node

NUMBER = Tensor("", 1, (1,), bytes(4), None)


def refusal(op_type: str, **attributes: Any) -> str:
    with pytest.raises(GraphFormatError) as refused:
        check_attributes(Node("here", op_type, "", (), (), attributes))
    return str(refused.value)


def test_only_known_operators_have_attributes() -> None:
    assert ATTRIBUTES.keys() <= {name for _, name in OPERATORS}


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("Conv", {"auto_pad": b"NOTSET", "group": 2, "pads": (1, 1, 1, 1)}),
        ("Gemm", {"alpha": 0.5, "transB": 1}),
        ("ConstantOfShape", {"value": NUMBER}),
        ("Add", {}),
        ("Pad", {"mode": b"reflect"}),
    ],
)
def test_what_the_exporter_writes(op_type: str, attributes: dict[str, Any]) -> None:
    check_attributes(Node("here", op_type, "", (), (), attributes))


@pytest.mark.parametrize(
    ("op_type", "attributes", "expected"),
    [
        ("Add", {"broadcast": 1}, "has node 'here' with the attribute 'broadcast', expected of Add none"),
        ("Softmax", {"Axis": 1}, "has node 'here' with the attribute 'Axis', expected of Softmax axis"),
        ("Gather", {"\x1b[2J": 1}, "has node 'here' with the attribute '\\x1b[2J', expected of Gather axis"),
        ("Conv", {"auto_pad": b"SAME_UPPER"}, "has node 'here' with auto_pad = 'SAME_UPPER', expected 'NOTSET'"),
        ("Conv", {"group": 1.0}, "has node 'here' with group = 1.0, expected a whole number"),
        ("Gemm", {"transA": 2}, "has node 'here' with transA = 2, expected 0 or 1"),
        ("Gemm", {"transA": 1.0}, "has node 'here' with transA = 1.0, expected 0 or 1"),
        ("Pad", {"mode": b"edge"}, "has node 'here' with mode = 'edge', expected 'constant' or 'reflect'"),
        ("ScatterND", {"reduction": b"add"}, "has node 'here' with reduction = 'add', expected 'none'"),
        ("QuantizeLinear", {"block_size": 2}, "has node 'here' with block_size = 2, expected 0"),
        ("QuantizeLinear", {"output_dtype": 3}, "has node 'here' with output_dtype = 3, expected 0"),
        ("MaxPool", {"ceil_mode": 1}, "has node 'here' with ceil_mode = 1, expected 0"),
        ("Resize", {"keep_aspect_ratio_policy": NUMBER}, "keep_aspect_ratio_policy = a tensor, expected 'stretch'"),
        ("ConstantOfShape", {"value": 1.0}, "has node 'here' with value = 1.0, expected a tensor"),
    ],
)
def test_an_attribute_that_is_not_allowed(op_type: str, attributes: dict[str, Any], expected: str) -> None:
    assert refusal(op_type, **attributes).endswith(expected)


def test_a_size_that_no_rule_infers() -> None:
    weight = constant("w", 1, [4, 2, 3, 3], np.ones((4, 2, 3, 3), np.float32).tobytes())
    nodes = [node("ConvTranspose", ["x", "w"], ["made"], strides=[200, 200], output_shape=[900, 1100])]
    content = graph(nodes, [weight], [TensorSpec("x", "float32", (1, 4, 5, 6))], [])
    data = encode(model([*content, (12, [(1, "made")])]))
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"x": np.ones((1, 4, 5, 6), np.float32)})
    assert made.shape[2:] == (900, 1100), "and not 803 × 1003, as strides and kernel say"
    (read,) = read_graph(encode(model(content))).nodes
    with pytest.raises(GraphFormatError, match=r"the attribute 'output_shape', expected of ConvTranspose auto_pad, "):
        check_attributes(read)

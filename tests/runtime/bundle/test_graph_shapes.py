"""The shapes that are inferred are those that ONNX Runtime computes, for every operator."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest

from latentrt.bundle.graph_shapes import INPUT_COUNTS, OPERATORS, infer_values, peak_bytes
from latentrt.bundle.graph_types import infer_types
from latentrt.bundle.onnx_graph import GraphFormatError, OnnxGraph, read_graph
from latentrt.bundle.onnx_types import CODES
from latentrt.bundle.tensors import TensorSpec
from tests.runtime.onnx_writer import Message, constant, encode, graph, model, node

X = TensorSpec("x", "float32", ("batch", 4, "height", "2*width"))
SIZES = {"batch": 2, "height": 6, "width": 5}
FLOAT, UINT8, INT8, INT64 = 1, 2, 3, 7
FILL = constant("", FLOAT, [1], struct.pack("<f", 2))


def floats(name: str, *shape: int) -> Message:
    """A tensor of ones."""
    return constant(name, FLOAT, shape, np.ones(shape, np.float32).tobytes())


def whole(name: str, *numbers: int) -> Message:
    return constant(name, INT64, [len(numbers)], struct.pack(f"<{len(numbers)}q", *numbers))


def scalar(name: str, number: int) -> Message:
    return constant(name, INT64, [], struct.pack("<q", number))


def build(nodes: Sequence[Message], constants: Sequence[Message], outputs: Sequence[str]) -> tuple[bytes, OnnxGraph]:
    """Return a graph of `x` whose outputs have no declared type, as bytes and as it is read."""
    content = graph(nodes, constants, [X], [])
    types = [(12, [(1, name)]) for name in outputs]
    data = encode([*model([*content, *types]), (8, [(1, "com.microsoft"), (2, 1)])])
    read = encode([*model(content), (8, [(1, "com.microsoft"), (2, 1)])])
    return data, read_graph(read)


def n(op_type: str, inputs: str, outputs: str = "made", **attributes: Any) -> Message:
    return node(op_type, inputs.split(" "), outputs.split(" "), **attributes)


UNARY = "Abs Clip Cos Erf Floor Identity LeakyRelu Mish Neg Reciprocal Relu Round Sigmoid Sin Sqrt Tanh"
BINARY = "Add Div Equal Greater Less Max Min Mul Pow Sub"
W = floats("w", 8, 4, 3, 3)
ROWS = n("Reshape", "x flat", "rows")
CONV: dict[str, Any] = {"kernel_shape": [3, 3], "pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}

CASES: dict[str, tuple[list[Message], list[Message]]] = {
    **{name: ([n(name, "x")], []) for name in UNARY.split()},
    **{name: ([n(name, "x other")], [floats("other", 3, 1, 4, 1, 1)]) for name in BINARY.split()},
    "Gelu": ([n("Gelu", "x")], []),
    "Cast": ([n("Cast", "x", to=INT64)], []),
    "Softmax": ([n("Softmax", "x", axis=1)], []),
    "Where": ([n("Greater", "x other", "more"), n("Where", "more x other")], [floats("other", 4, 1, 1)]),
    "BatchNormalization": ([n("BatchNormalization", "x f f f f")], [floats("f", 4)]),
    "GroupNormalization": ([n("GroupNormalization", "x f f", num_groups=2)], [floats("f", 4)]),
    "LayerNormalization": ([n("LayerNormalization", "x f", axis=-1)], [floats("f", 10)]),
    "QuantizeLinear": ([n("QuantizeLinear", "x s zero")], [floats("s"), constant("zero", UINT8, [], b"\0")]),
    "DequantizeLinear": (
        [n("QuantizeLinear", "x s zero", "q"), n("DequantizeLinear", "q s zero")],
        [floats("s"), constant("zero", UINT8, [], b"\0")],
    ),
    "MatMul": ([n("MatMul", "x w")], [floats("w", 10, 3)]),
    "MatMul of batches": ([n("MatMul", "x w")], [floats("w", 2, 1, 10, 3)]),
    "Gemm": ([ROWS, n("Gemm", "rows w", transB=1)], [whole("flat", -1, 4), floats("w", 9, 4)]),
    "Gemm of transposed": ([ROWS, n("Gemm", "rows w", transA=1)], [whole("flat", 4, -1), floats("w", 4, 9)]),
    "Conv": ([n("Conv", "x w", **CONV)], [W]),
    "Conv of groups": ([n("Conv", "x w", group=2)], [floats("w", 6, 2, 2, 1)]),
    "ConvTranspose": (
        [n("ConvTranspose", "x w", pads=[1, 0, 1, 1], strides=[2, 3], output_padding=[1, 2])],
        [floats("w", 4, 5, 3, 4)],
    ),
    "MaxPool": ([n("MaxPool", "x", kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 0])], []),
    "ReduceMean": ([n("ReduceMean", "x axes")], [whole("axes", -1, 1)]),
    "ReduceMax": ([n("ReduceMax", "x axes", keepdims=0)], [whole("axes", 2)]),
    "ReduceSum": ([n("ReduceSum", "x", keepdims=0)], []),
    "ReduceL2": ([n("ReduceL2", "x", noop_with_empty_axes=1)], []),
    "ArgMax": ([n("ArgMax", "x", axis=2, keepdims=0)], []),
    "Concat": ([n("Concat", "x x x", axis=-2)], []),
    "Split": ([n("Split", "x sizes", "made b c", axis=1)], [whole("sizes", 1, 1, 2)]),
    "Split evenly": ([n("Split", "x", "made b c d", axis=3, num_outputs=4)], []),
    "Slice": ([n("Slice", "x starts ends axes steps")], [
        whole("starts", 1, -1, 3), whole("ends", 1 << 40, -100, -1), whole("axes", 1, 2, -1), whole("steps", 2, -2, 1)
    ]),
    "Gather": ([n("Gather", "x i", axis=2)], [constant("i", INT64, [3, 2], bytes(48))]),
    "GatherElements": ([n("GatherElements", "x i", axis=0)], [constant("i", INT64, [1, 2, 3, 4], bytes(192))]),
    "GatherND": ([n("GatherND", "x i", batch_dims=1)], [constant("i", INT64, [2, 3, 2], bytes(96))]),
    "ScatterElements": (
        [n("ScatterElements", "x i u", axis=1)],
        [constant("i", INT64, [1, 1, 1, 1], bytes(8)), floats("u", 1, 1, 1, 1)],
    ),
    "ScatterND": ([n("ScatterND", "x i u")], [constant("i", INT64, [1, 4], bytes(32)), floats("u", 1)]),
    "Transpose": ([n("Transpose", "x", perm=[2, 0, 3, 1])], []),
    "Squeeze": (
        [n("Unsqueeze", "x axes", "more"), n("Squeeze", "more first")], [whole("axes", 0, -1), whole("first", 0)]
    ),
    "Unsqueeze": ([n("Unsqueeze", "x axes")], [whole("axes", -1, 2)]),
    "Reshape": ([n("Reshape", "x sizes")], [whole("sizes", 0, -1, 5)]),
    "Expand": ([n("Expand", "x sizes")], [whole("sizes", 3, 1, 4, 1, 1)]),
    "Range": ([n("Range", "a b c")], [scalar("a", 9), scalar("b", -2), scalar("c", -3)]),
    "ConstantOfShape": ([n("ConstantOfShape", "sizes", value=FILL)], [whole("sizes", 3, 2)]),
    "Pad by reflection": ([n("Pad", "x pads", mode="reflect")], [whole("pads", 0, 0, 5, 1, 0, 0, 1, 2)]),
    "Pad": ([n("Pad", "x pads nothing axes")], [whole("pads", 1, 2, 3, 4), floats("nothing"), whole("axes", 3, 1)]),
    "Resize by scales": (
        [n("Resize", "x  s", mode="nearest")],
        [constant("s", FLOAT, [4], struct.pack("<4f", 1, 1, 1.5, 0.35))],
    ),
    "Resize to sizes": ([n("Resize", "x   s", mode="linear", axes=[2, 3])], [whole("s", 3, 17)]),
    "TopK": ([n("TopK", "x k", "made places", axis=2)], [whole("k", 3)]),
    "MultiHeadAttention": (
        [n("MatMul", "x w", "v4"), n("Reshape", "x q", "q3"), n("Reshape", "v4 v", "v3"),
         n("MultiHeadAttention", "q3 q3 v3", num_heads=2, domain="com.microsoft")],
        [floats("w", 10, 4), whole("q", 2, 24, 10), whole("v", 2, 24, 4)],
    ),
}  # fmt: skip

# The calculated sizes become the shape of the output. Shape of x: [2, 4, 6, 10].
CALCULATED: dict[str, tuple[list[Message], list[Message]]] = {
    "Shape with start and end": ([n("Shape", "x", "s", start=-3, end=-1)], []),
    "Gather": ([n("Shape", "x", "all"), n("Gather", "all i", "s")], [whole("i", 3, 0)]),
    "Concat, Unsqueeze and a scalar": (
        [n("Shape", "x", "all"), n("Gather", "all i", "one"), n("Unsqueeze", "one zero", "row"),
         n("Concat", "row w", "s", axis=0)],
        [scalar("i", 2), whole("zero", 0), whole("w", 3)],
    ),
    "Slice from the end": (
        [n("Shape", "x", "all"), n("Slice", "all starts ends axes steps", "s")],
        [whole("starts", -1), whole("ends", -9), whole("axes", 0), whole("steps", -2)],
    ),
    "Add Sub Mul Max Min Neg Abs": (
        [n("Shape", "x", "all"), n("Add", "all w", "a"), n("Mul", "a a", "b"), n("Neg", "b", "c"), n("Sub", "c w", "d"),
         n("Abs", "d", "e"), n("Max", "e all", "f"), n("Min", "f limit", "s")],
        [whole("w", 1), whole("limit", 30)],
    ),
    "Div of whole numbers below 0": (
        [n("Shape", "x", "all"), n("Sub", "w all", "a"), n("Div", "a two", "b"), n("Abs", "b", "s")],
        [whole("w", -1), whole("two", 2)],
    ),
    "numbers with fractions": (
        [n("Shape", "x", "all"), n("Cast", "all", "a", to=FLOAT), n("Div", "a w", "b"), n("Sqrt", "b", "c"),
         n("Mul", "c w", "d"), n("Floor", "d", "e"), n("Round", "b", "f"), n("Add", "e f", "g"),
         n("Cast", "g", "s", to=INT64)],
        [constant("w", FLOAT, [1], struct.pack("<f", 2.5))],
    ),
    "Where, Greater, Less and Equal": (
        [n("Shape", "x", "all"), n("Greater", "all w", "a"), n("Where", "a w all", "b"), n("Less", "b w", "c"),
         n("Where", "c all b", "d"), n("Equal", "d all", "e"), n("Where", "e d w", "s")],
        [whole("w", 5)],
    ),
    "Reshape, Squeeze and Identity": (
        [n("Shape", "x", "all"), n("Reshape", "all square", "a"), n("Squeeze", "a zero", "b"), n("Identity", "b", "s")],
        [whole("square", 1, 4), whole("zero", 0)],
    ),
}  # fmt: skip


def compute(data: bytes) -> Any:
    x = np.zeros((2, 4, 6, 10), np.float32)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x} if session.get_inputs() else {})


@pytest.mark.parametrize("name", CASES)
def test_an_operator(name: str) -> None:
    nodes, constants = CASES[name]
    outputs = [content for number, content in nodes[-1] if number == 2]
    data, read = build(nodes, constants, outputs)
    shapes = infer_values(read, SIZES)[0]
    for output, array in zip(outputs, compute(data), strict=True):
        assert shapes[output] == array.shape


@pytest.mark.parametrize("name", CALCULATED)
def test_calculated_sizes(name: str) -> None:
    nodes, constants = CALCULATED[name]
    data, read = build([*nodes, n("ConstantOfShape", "s", value=FILL)], constants, ["made"])
    assert infer_values(read, SIZES)[0]["made"] == compute(data)[0].shape


def test_every_operator_is_compared() -> None:
    compared = {dict(each)[4] for nodes, _ in (*CASES.values(), *CALCULATED.values()) for each in nodes}
    assert compared == {name for _, name in OPERATORS}


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([n("MatMul", "x x")], []),
        ([n("Reshape", "x s")], [whole("s", 7, -1)]),
        ([n("Expand", "x s")], [whole("s", 3, 3)]),
        ([n("Gather", "x i", axis=4)], [scalar("i", 0)]),
        ([n("Range", "a b c")], [scalar("a", 0), scalar("b", 9), scalar("c", 0)]),
        ([n("Cast", "x", "y", to=INT64), n("ConstantOfShape", "y", value=FILL)], []),
        ([n("Shape", "x", "s"), n("Gather", "s i", "y"), n("Div", "s zero")], [scalar("i", 0), whole("zero", 0)]),
        ([n("Gather", "w i")], [scalar("w", 5), scalar("i", 0)]),
        ([n("Gather", "w i", axis=1)], [whole("w", 5), whole("i", 0)]),
        ([n("Shape", "x", "s"), n("Where", "s", "sizes")], []),
        ([n("Clip", "x f")], [floats("f", 4)]),
        ([n("BatchNormalization", "x f f f w")], [floats("f", 4), floats("w", 5)]),
        ([n("GroupNormalization", "x f f", num_groups=3)], [floats("f", 4)]),
        ([n("GroupNormalization", "x f f")], [floats("f", 4)]),
        ([n("GroupNormalization", "x f w", num_groups=2)], [floats("f", 4), floats("w", 2)]),
        ([n("LayerNormalization", "x f", axis=-1)], [floats("f", 9)]),
        ([n("QuantizeLinear", "x s zero")], [floats("s", 3), constant("zero", UINT8, [3], bytes(3))]),
        ([n("QuantizeLinear", "x s zero")], [floats("s", 4), constant("zero", UINT8, [], b"\0")]),
        ([ROWS, n("Gemm", "rows w b", transB=1)], [whole("flat", -1, 4), floats("w", 9, 4), floats("b", 8)]),
        ([n("Softmax", "x", axis=4)], []),
        ([n("Cast", "w", to=6)], [constant("w", FLOAT, [1], struct.pack("<f", 3e9))]),
        ([n("Cast", "w", to=INT64)], [constant("w", FLOAT, [1], struct.pack("<f", 2.0**63))]),
        ([n("Cast", "w", to=INT64)], [constant("w", FLOAT, [1], struct.pack("<f", float("nan")))]),
        ([n("Cast", "w", to=INT8)], [whole("w", 128)]),
        ([n("Mul", "w w")], [whole("w", 1 << 16)]),
        ([n("Sub", "w w")], [whole("w", (1 << 31) + 5)]),
        ([n("Pad", "x pads")], [whole("pads", 0, 0, -1, 0, 0, 0, 2, 0)]),
        ([n("Pad", "x pads", mode="reflect")], [whole("pads", 0, 0, -4, 0, 0, 0, 3, 0)]),
        ([n("Cast", "x", to=16)], []),
        ([n("Shape", "x", "s"), n("Cast", "s", to=16)], []),
        ([n("Cast", "x")], []),
        ([n("Conv", "x w", kernel_shape=[3, 4])], [W]),
        ([n("Conv", "x w", pads=[1, 1, 1, -1])], [W]),
        ([n("Conv", "x w", group=0)], [W]),
        ([n("Conv", "x w", group=-4)], [W]),
        ([n("Conv", "x w", group=3)], [floats("w", 6, 1, 3, 3)]),
        ([n("Conv", "x w b")], [W, floats("b", 4)]),
        ([n("Conv", "x w")], [floats("w", 8, 5, 3, 3)]),
        ([n("ConvTranspose", "x w")], [floats("w", 5, 4, 3, 3)]),
        ([n("ConvTranspose", "x w", kernel_shape=[2, 2])], [floats("w", 4, 4, 3, 3)]),
        ([n("GatherElements", "x i", axis=0)], [constant("i", INT64, [1, 5, 3, 4], bytes(480))]),
        ([n("GatherND", "x i", batch_dims=1)], [constant("i", INT64, [3, 3, 2], bytes(144))]),
        (
            [n("ScatterElements", "x i u", axis=1)],
            [constant("i", INT64, [1, 1, 1, 1], bytes(8)), floats("u", 1, 1, 1, 2)],
        ),
        ([n("ScatterND", "x i u")], [constant("i", INT64, [1, 4], bytes(32)), floats("u", 2)]),
        ([n("TopK", "x k", "made places", axis=2)], [whole("k", 7)]),
        ([n("Pad", "x pads", mode="reflect")], [whole("pads", 0, 0, 6, 1, 0, 0, 1, 1)]),
        (
            [n("Reshape", "x q", "q3"), n("MultiHeadAttention", "q3 q3 q3", num_heads=3, domain="com.microsoft")],
            [whole("q", 2, 24, 10)],
        ),
        (
            [
                n("Reshape", "x q", "q3"),
                n("Reshape", "x k", "k3"),
                n("MultiHeadAttention", "q3 k3 k3", num_heads=2, domain="com.microsoft"),
            ],
            [whole("q", 2, 24, 10), whole("k", 2, 12, 20)],
        ),
        ([n("Concat", "x w", axis=0)], [floats("w", 1, 1)]),
        ([n("Concat", "x x")], []),
        ([n("Split", "x s", "made more", axis=1, num_outputs=3)], [whole("s", 1, 3)]),
        ([n("Add", "x", "made more")], []),
        ([n("Transpose", "x", perm=[0, 0, 1, 2])], []),
        ([n("ConstantOfShape", "s", value=FILL)], [whole("s", -3)]),
    ],
)
def test_a_node_that_does_not_fit_its_inputs(nodes: list[Message], constants: list[Message]) -> None:
    _, read = build(nodes, constants, [])
    with pytest.raises(GraphFormatError):
        infer_values(read, SIZES)


COLUMNS = [n("Slice", "x zero zero last", "none")]
FROM, LAST = whole("zero", 0), whole("last", -1)


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        (COLUMNS, [FROM, LAST]),
        ([n("TopK", "x k", "made places", axis=2)], [whole("k", 0)]),
        ([n("Split", "x sizes", "made b", axis=1)], [whole("sizes", 0, 4)]),
        ([n("Gather", "x none", axis=1)], [whole("none")]),
        ([n("ConstantOfShape", "sizes", value=FILL)], [whole("sizes", 3, 0)]),
        ([n("Range", "a a b")], [scalar("a", 1), scalar("b", 1)]),
        ([n("Resize", "x   s", mode="linear", axes=[2, 3])], [whole("s", 0, 3)]),
        ([n("Conv", "x w")], [floats("w", 0, 4, 3, 3)]),
        ([n("Shape", "x", start=1, end=1)], []),
        ([n("MaxPool", "empty", kernel_shape=[2, 2], pads=[1, 1, 1, 1])], [floats("empty", 1, 4, 8, 0)]),
        ([n("Conv", "empty w", pads=[0, 2, 0, 2])], [floats("empty", 1, 4, 8, 0), floats("w", 4, 4, 1, 1)]),
        ([n("MatMul", "left right")], [floats("left", 2, 8, 0), floats("right", 2, 0, 8)]),
        ([n("Gemm", "left right")], [floats("left", 8, 0), floats("right", 0, 8)]),
        ([n("MultiHeadAttention", "q k k", num_heads=1, domain="com.microsoft")],
         [floats("q", 1, 8, 4), floats("k", 1, 0, 4)]),
        ([n("MultiHeadAttention", "q q v", num_heads=1, domain="com.microsoft")],
         [floats("q", 1, 8, 4), floats("v", 1, 8, 0)]),
        ([n("Concat", "x empty", axis=1)], [floats("empty", 2, 0, 6, 10)]),
        ([n("ReduceSum", "empty axes")], [floats("empty", 0, 4), whole("axes", 0)]),
        ([n("ReduceMean", "empty axes")], [floats("empty", 0, 4), whole("axes", 0)]),
        ([n("Pad", "x pads nothing")], [whole("pads", *[1] * 8), floats("nothing", 0)]),
    ],
)  # fmt: skip
def test_an_empty_tensor(nodes: list[Message], constants: list[Message]) -> None:
    """Backends divide by its sizes (SIGFPE), or return memory that nothing was written to."""
    _, read = build(nodes, constants, [])
    with pytest.raises(GraphFormatError, match=r"sizes from 1|no size of 0|input 2 of shape \[0\]"):
        infer_values(read, SIZES)


def test_empty_axes_and_sizes() -> None:
    nodes = [n("ReduceSum", "x none", "sum", keepdims=0), n("Reshape", "sum none", "a"), n("Expand", "a none", "made")]
    data, read = build(nodes, [whole("none")], ["made"])
    assert infer_values(read, SIZES)[0]["made"] == compute(data)[0].shape == ()


@pytest.mark.parametrize(
    ("node", "fragment"),
    [
        (n("MaxPool", "x", kernel_shape=[0, 2]), "kernel_shape [0, 2], expected 1 to 65,536"),
        (n("MaxPool", "x", kernel_shape=[2, 2], strides=[1, 0]), "strides [1, 0], expected 1"),
        (n("MaxPool", "x", kernel_shape=[2, 2], dilations=[1 << 40, 1]), "expected 1 to 65,536"),
        (n("MaxPool", "x", kernel_shape=[2, 3], pads=[0, 0, 0, 3]), "each below the kernel [2, 3]"),
        (n("MaxPool", "x", kernel_shape=[2, 2], pads=[0, 0, 0, 0, 0]), "another number of axes"),
        (n("MaxPool", "x"), "another number of axes"),
        (n("MaxPool", "flat"), "another number of axes"),
        (n("Conv", "x small", kernel_shape=[0, 0]), "expected [1, 1] as its weight has"),
        (n("ConvTranspose", "x small", strides=[2, 2], output_padding=[0, 2]), "output_padding [0, 2], expected 0 to"),
        (n("ConvTranspose", "x small", strides=[2, 2], output_padding=[-1, 0]), "output_padding [-1, 0]"),
    ],
)
def test_a_window_that_backends_disagree_on(node: Message, fragment: str) -> None:
    _, read = build([node], [floats("small", 4, 4, 1, 1), floats("flat", 4, 4)], [])
    with pytest.raises(GraphFormatError) as refused:
        infer_values(read, SIZES)
    assert fragment in str(refused.value)


@pytest.mark.parametrize(
    ("nodes", "constants"),
    [
        ([n("Slice", "x starts ends axes")], [whole("starts", 0, 4), whole("ends", 8, 8), whole("axes", 3, -1)]),
        ([n("Squeeze", "ones axes")], [floats("ones", 1, 1, 1), whole("axes", 0, -3)]),
        ([n("Unsqueeze", "x axes")], [whole("axes", 0, -6)]),
        ([n("ReduceSum", "x axes")], [whole("axes", 1, 1)]),
        ([n("Pad", "x pads  axes")], [whole("pads", 1, 1, 1, 1), whole("axes", 3, 3)]),
        ([n("Resize", "x   s", axes=[3, 3])], [whole("s", 3, 3)]),
    ],
)
def test_an_axis_twice(nodes: list[Message], constants: list[Message]) -> None:
    _, read = build(nodes, constants, [])
    with pytest.raises(GraphFormatError, match="expected each once"):
        infer_values(read, SIZES)


@pytest.mark.parametrize(("domain", "op_type"), sorted(OPERATORS))
def test_the_number_of_inputs(domain: str, op_type: str) -> None:
    least, most = INPUT_COUNTS[domain, op_type]
    wrong = [["x"] * (least - 1), ["x"] * (least - 1) + [""], *([["x"] * (most + 1)] if most < 100 else [])]
    for inputs in wrong:
        _, read = build([node(op_type, inputs, ["made"], domain=domain)], [], [])
        with pytest.raises(GraphFormatError, match=r"inputs, expected|leaves out input"):
            infer_values(read, SIZES)


def test_values_that_are_too_many_to_evaluate() -> None:
    """The work is bounded by the elements of all evaluated nodes together, however many nodes share them."""
    wide, row = whole("wide", *range(256)), whole("row", *range(16))

    def build_maxima(count: int) -> OnnxGraph:
        return build([n("Max", " ".join(["wide"] * 63), f"made{index}") for index in range(count)], [wide], [])[1]

    assert len(infer_values(build_maxima(60), SIZES)[1]) == 61
    with pytest.raises(GraphFormatError, match="more than 1,048,576 sizes"):
        infer_values(build_maxima(70), SIZES)
    _, joined = build([n("Concat", " ".join(["row"] * 17), axis=0)], [row], [])
    shapes, values = infer_values(joined, SIZES)
    assert shapes["made"] == (272,)
    assert "made" not in values


@pytest.mark.parametrize(
    ("nodes", "constants", "fragment"),
    [
        ([n("Reshape", "x sizes")], [whole("sizes", *[1] * 65)], "65 numbers in input 1, expected at most 64"),
        ([n("Reshape", "one sizes")], [floats("one"), whole("sizes", *[1] * 9)], "expected at most 8 sizes"),
        ([n("Unsqueeze", "x axes")], [whole("axes", *range(5))], "expected at most 8 sizes"),
    ],
)
def test_more_axes_than_a_tensor_has(nodes: list[Message], constants: list[Message], fragment: str) -> None:
    _, read = build(nodes, constants, [])
    with pytest.raises(GraphFormatError, match=fragment):
        infer_values(read, SIZES)


def test_the_peak_counts_what_is_held_at_one_time() -> None:
    nodes = [n("Concat", "x x", "a", axis=0), n("Relu", "a", "b"), n("ReduceMax", "b", "c"), n("Add", "c c", "d")]
    _, read = build(nodes, [], [])
    size = 4 * 2 * 4 * 6 * 10
    # a and b; x is released when a is made, but not before.
    assert peak_bytes(read, infer_types(read), infer_values(read, SIZES)[0]) == (4 * size, "b/Relu")


@pytest.mark.parametrize(("dtype", "nbytes"), [("float16", 4), ("bool", 4), ("float32", 4), ("int64", 8)])
def test_the_peak_counts_wide_elements(dtype: str, nbytes: int) -> None:
    _, read = build([n("Cast", "x", "y", to=CODES[dtype]), n("Identity", "y")], [], [])
    size = 2 * 4 * 6 * 10
    assert peak_bytes(read, infer_types(read), infer_values(read, SIZES)[0])[0] == 2 * max(nbytes * size, 4 * size)


def test_the_peak_counts_what_is_calculated_from_constants_until_the_end() -> None:
    """ONNX Runtime computes all of it while it loads a graph, and drops nothing until it has."""
    nodes = [
        n("ConstantOfShape", "s", "a", value=FILL),
        n("ReduceMax", "a", "b"),
        n("ConstantOfShape", "s", "c", value=FILL),
    ]
    _, read = build([*nodes, n("ReduceMax", "c", "d"), n("Add", "b d", "e")], [whole("s", 1000)], [])
    x, (peak, _) = 4 * 2 * 4 * 6 * 10, peak_bytes(read, infer_types(read), infer_values(read, SIZES)[0])
    assert peak == x + 4 * (1000 + 1 + 1000 + 1 + 1)

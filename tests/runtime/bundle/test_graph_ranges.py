"""Indices stay inside their data and divisors above 0, for every value that a run may feed."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest

from latentrt.bundle.graph_ranges import Range, check_ranges
from latentrt.bundle.graph_shapes import infer_values
from latentrt.bundle.graph_types import infer_types
from latentrt.bundle.onnx_graph import GraphFormatError, OnnxGraph, read_graph
from latentrt.bundle.tensors import TensorSpec
from tests.runtime.onnx_writer import Message, constant, encode, graph, model, node

IDS, PLACE = TensorSpec("ids", "int64", ("batch", 3)), TensorSpec("place", "int64", ("batch",))
SCORES = TensorSpec("scores", "float32", ("batch", 5))
SIZES = {"batch": 2}
RANGES = {"ids": (0, 9), "place": (1, 4)}
INT32, INT64, BOOL = 6, 7, 9
# More numbers than an operation on sizes may have.
TABLE = constant("table", 1, [10, 40], np.arange(400, dtype=np.float32).tobytes())


def n(op_type: str, inputs: str, outputs: str = "made", **attributes: Any) -> Message:
    return node(op_type, inputs.split(" "), outputs.split(" "), **attributes)


def whole(name: str, *numbers: int) -> Message:
    return constant(name, INT64, [len(numbers)], struct.pack(f"<{len(numbers)}q", *numbers))


def scalar(name: str, number: int) -> Message:
    return constant(name, INT64, [], struct.pack("<q", number))


ZERO, LAST = whole("zero", 0), whole("last", -1)


def build(nodes: Sequence[Message], constants: Sequence[Message]) -> OnnxGraph:
    return read_graph(encode(model(graph(nodes, constants, [IDS, PLACE, SCORES], []))))


def check(nodes: Sequence[Message], constants: Sequence[Message], ranges: dict[str, Range] | None = None) -> None:
    read = build(nodes, constants)
    check_ranges(read, infer_types(read), *infer_values(read, SIZES), RANGES if ranges is None else ranges)


def row(name: str, outputs: str = "column") -> Message:
    return n("Unsqueeze", f"{name} last", outputs)


BATCH = [n("Shape", "ids", "size", start=0, end=1), n("Squeeze", "size zero", "count"),
         n("Range", "first count step", "rows"), row("rows", "left"), row("place", "right"),
         n("Concat", "left right", "both", axis=-1)]  # fmt: skip
CONSTANTS = [ZERO, LAST, scalar("first", 0), scalar("step", 1)]
FOUND = n("TopK", "scores k", "best where", axis=1)
INSIDE: dict[str, tuple[list[Message], list[Message]]] = {
    "an input with a range": ([n("Gather", "table ids")], [TABLE]),
    "a constant": ([n("Gather", "table w")], [TABLE, whole("w", 9, 0)]),
    "what a request counts back from the end": ([n("Sub", "w place", "i"), n("Gather", "table i")],
                                                [TABLE, whole("w", 10)]),
    "places of the largest": ([FOUND, n("GatherElements", "scores where", axis=1)], [whole("k", 2)]),
    "the place of the largest": (
        [n("ArgMax", "scores", "where", axis=1, keepdims=1), n("GatherElements", "scores where", axis=1)], []
    ),
    "each column in its own axis": ([*BATCH, n("GatherND", "scores both")], CONSTANTS),
    "indices that were themselves taken": (
        [FOUND, n("Gather", "w where", "i"), n("Reshape", "i flat", "j"), n("Gather", "table j")],
        [TABLE, whole("k", 2), whole("w", 1, 2, 3, 4, 9), whole("flat", -1)],
    ),
    "places and a stride": (
        [FOUND, n("Mul", "where two", "a"), n("Add", "a one", "b"), n("Gather", "table b")],
        [TABLE, whole("k", 1), whole("two", 2), whole("one", 1)],
    ),
    "a choice of two": (
        [n("Less", "ids five", "less"), n("Where", "less ids five", "i"), n("Gather", "table i")],
        [TABLE, whole("five", 5)],
    ),
    "scattered": (
        [FOUND, n("ScatterElements", "scores where best", axis=1)], [whole("k", 2)],
    ),
    "scattered at constants": (
        [n("ScatterND", "table w u")],
        [TABLE, constant("w", INT64, [1, 2], struct.pack("<2q", 9, 3)), constant("u", 1, [1], bytes(4))],
    ),
    "scattered indices": (
        [FOUND, n("ScatterElements", "w where v", "i", axis=1), n("Gather", "table i")],
        [TABLE, whole("k", 1), constant("w", INT64, [2, 5], struct.pack("<10q", *range(10))),
         constant("v", INT64, [2, 1], struct.pack("<2q", 9, 9))],
    ),
    "the quotient": ([n("Div", "ids four", "i"), n("Gather", "small i")],
                     [whole("four", 4), constant("small", 1, [3], bytes(12))]),
    "32 bits": ([n("Cast", "ids", "i", to=INT32), n("Gather", "table i")], [TABLE]),
    "a truth": ([n("Equal", "ids one", "b"), n("Cast", "b", "i", to=INT64), n("Gather", "small i")],
                [whole("one", 1), constant("small", 1, [2], bytes(8))]),
    "below and above": (
        [n("Neg", "ids", "a"), n("Abs", "a", "b"), n("Max", "b one", "c"), n("Min", "c two", "d"),
         n("Gather", "small d")],
        [whole("one", 1), whole("two", 2), constant("small", 1, [3], bytes(12))],
    ),
    "cut off below": (
        [n("Sub", "ids three", "a"), n("Clip", "a none", "i"), n("Gather", "table i")],
        [TABLE, whole("three", 3), scalar("none", 0)],
    ),
    "cut off above": (
        [n("Mul", "ids three", "a"), n("Clip", "a  nine", "i"), n("Gather", "table i")],
        [TABLE, whole("three", 3), scalar("nine", 9)],
    ),
    "any numbers cut off": (
        [n("Cast", "scores", "a", to=INT64), n("Clip", "a none nine", "i"), n("Gather", "table i")],
        [TABLE, scalar("none", 0), scalar("nine", 9)],
    ),
    "a divisor from a request": ([row("place"), n("Div", "ids column")], [LAST]),
}  # fmt: skip


def run(nodes: Sequence[Message], constants: Sequence[Message], feeds: dict[str, Any]) -> None:
    """Run a graph in ONNX Runtime, which fails at an index outside the data."""
    content = graph(nodes, constants, [IDS, PLACE, SCORES], [])
    (output, *_) = [each for number, each in nodes[-1] if number == 2]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = encode(model([*content, (12, [(1, output)])]))
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    session.run(None, {each.name: feeds[each.name] for each in session.get_inputs()})


@pytest.mark.parametrize("name", INSIDE)
def test_indices_inside(name: str) -> None:
    nodes, constants = INSIDE[name]
    check(nodes, constants)
    scores = np.arange(10, dtype=np.float32).reshape(2, 5)
    for ids, place in ((0, 1), (9, 4)):
        run(nodes, constants, {"ids": np.full((2, 3), ids), "place": np.full(2, place), "scores": scores})


OUTSIDE: dict[str, tuple[list[Message], list[Message], str]] = {
    "a constant beyond": ([n("Gather", "table w")], [TABLE, whole("w", 10)], "numbers from 10 to 10"),
    "a constant below": ([n("Gather", "table w")], [TABLE, whole("w", -1)], "numbers from -1 to -1"),
    "an input too large for its data": (
        [n("Gather", "small ids")], [constant("small", 1, [9], bytes(36))], "0 to 9 as an index of an axis of 9"
    ),
    "more than the request may count back": (
        [n("Sub", "w place", "i"), n("Gather", "table i")], [TABLE, whole("w", 3)], "numbers from -1 to 2"
    ),
    "a product": ([n("Mul", "ids w", "i"), n("Gather", "table i")], [TABLE, whole("w", 2)], "from 0 to 18"),
    "a sum that wraps around": (
        [n("Add", "ids w", "i"), n("Gather", "table i")], [TABLE, whole("w", (1 << 63) - 1)], "without a known range"
    ),
    "numbers that a cast cuts off": (
        [n("Cast", "w", "i", to=2), n("Gather", "table i")], [TABLE, whole("w", *range(300))], "from 0 to 255"
    ),
    "rounded numbers": (
        [n("Cast", "scores", "i", to=INT64), n("Gather", "table i")], [TABLE], "without a known range"
    ),
    "elements": (
        [n("GatherElements", "scores w", axis=1)],
        [constant("w", INT64, [2, 1], struct.pack("<2q", 0, 5))], "from 0 to 5 as an index of an axis of 5",
    ),
    "a column for another axis": (
        [*BATCH, n("Concat", "right left", "wrong", axis=-1), n("GatherND", "scores wrong")], CONSTANTS, "axis of 2"
    ),
    "columns that are not told apart": (
        [*BATCH, n("Transpose", "both", "other", perm=[0, 1]), n("GatherND", "scores other")], CONSTANTS, "axis of 2"
    ),
    "scattered": (
        [FOUND, n("Add", "where one", "i"), n("ScatterElements", "scores i best", axis=1)],
        [whole("k", 2), whole("one", 1)], "from 1 to 5 as an index of an axis of 5",
    ),
    "scattered over the edge": (
        [n("ScatterND", "table w u")],
        [TABLE, constant("w", INT64, [1, 2], struct.pack("<2q", 9, 40)), constant("u", 1, [1], bytes(4))],
        "from 40 to 40 as an index of an axis of 40",
    ),
    "scattered indices": (
        [FOUND, n("ScatterElements", "w where v", "i", axis=1), n("Gather", "table i")],
        [TABLE, whole("k", 1), constant("w", INT64, [2, 5], struct.pack("<10q", *range(10))),
         constant("v", INT64, [2, 1], struct.pack("<2q", 9, 10))], "from 0 to 10",
    ),
    "an attribute that the operator has not": (
        [n("ScatterND", "table w u", batch_dims=1)],
        [TABLE, constant("w", INT64, [1, 2], struct.pack("<2q", 10, 0)), constant("u", 1, [1], bytes(4))],
        "from 10 to 10 as an index of an axis of 10",
    ),
    "numbers of more than 32 bits": (
        [n("Mul", "ids m", "a"), n("Div", "a m", "i"), n("Gather", "table i")],
        [TABLE, whole("m", (1 << 31) + 5)], "without a known range",
    ),
    "cut off too high": (
        [n("Mul", "ids two", "a"), n("Clip", "a none ten", "i"), n("Gather", "table i")],
        [TABLE, whole("two", 2), scalar("none", 0), scalar("ten", 10)], "from 0 to 10",
    ),
    "any numbers cut off on one side": (
        [n("Cast", "scores", "a", to=INT64), n("Clip", "a none", "i"), n("Gather", "table i")],
        [TABLE, scalar("none", 0)], "without a known range",
    ),
    "cut off at any number": (
        [n("Cast", "scores", "a", to=INT64), n("ReduceMax", "a", "b", keepdims=0), n("Clip", "ids none b", "i"),
         n("Gather", "table i")],
        [TABLE, scalar("none", 0)], "without a known range",
    ),
    "a divisor of 0": ([n("Div", "ids w")], [whole("w", 0)], "divides whole numbers by numbers from 0 to 0"),
    "a divisor of −1": ([n("Div", "ids w")], [whole("w", -1)], "from -1 to -1"),
    "a divisor that an input makes 0": ([row("place"), n("Div", "column ids")], [LAST], "from 0 to 9, expected"),
    "a divisor that sizes make 0": (
        [n("Shape", "ids", "s", start=0, end=1), n("Sub", "s two", "d"), n("Div", "ids d")],
        [whole("two", 2)], "from 0 to 0",
    ),
    "a divisor without a range": (
        [n("Cast", "scores", "y", to=INT64), n("Sub", "y y", "d"), n("Div", "y d")], [], "without a known range"
    ),
    "a divisor whose type a constant hides": (
        [n("ArgMax", "scores", "y", axis=1), n("Where", "b y y", "z"), n("Div", "place z")],
        [constant("b", BOOL, [1], b"\1")], "from 0 to 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_indices_outside(name: str) -> None:
    nodes, constants, fragment = OUTSIDE[name]
    with pytest.raises(GraphFormatError) as refused:
        check(nodes, constants)
    assert fragment in str(refused.value)


def test_an_input_without_a_range_is_no_index() -> None:
    with pytest.raises(GraphFormatError, match="without a known range as an index"):
        check([n("Gather", "table ids")], [TABLE], {})


def test_numbers_with_fractions_may_be_divided_by_anything() -> None:
    check([n("Div", "scores scores")], [])


def test_a_zero_point_that_is_left_out() -> None:
    nodes = [n("QuantizeLinear", "scores s ", "q"), n("Cast", "q", "i", to=INT64), n("Gather", "wide i")]
    scale, wide = constant("s", 1, [], struct.pack("<f", 1)), constant("wide", 1, [256, 2], bytes(2048))
    check(nodes, [scale, wide])

"""Extracting parts of small graphs: boundary values, repeated nodes, and graphs that cannot be split."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import ExportError
from latentrt_export.graphs.subgraph import boundary_values, extract_subgraph
from tests.export.small_graph import run, small_graph

# The batch is read from t, as the tracer does it; H is x's alone.
WHOLE = """
g (float[B,H,4] x, float[B] t, float[B,L,4] p, float[4,4] w) => (float[B,L,4] y)
<int64[1] one = {1}, int64[1] rest = {-1}, int64[1] four = {4}> {
  column = Unsqueeze(t, one)
  sine = Sin(column)
  late = Unsqueeze(LATE, one)
  batch = Shape<start = 0, end = 1>(t)
  target = Concat<axis = 0>(batch, rest, four)
  linear = MatMul(p, w)
  keys = Reshape(linear, target)
  rows = ReduceSum<keepdims = 1>(x, one)
  weighted = MatMul(rows, w)
  sum = Add(weighted, KEYS)
  product = Mul(sum, late)
  y = Reshape(product, target)
}
"""
TIME = TensorSpec("time", "float32", ("B", 1))
KEYS = TensorSpec("keys_of_p", "float32", ("B", "L", 4))


def whole(late: str = "sine", keys: str = "keys", extra: str = "") -> ir.Model:
    text = WHOLE.replace("LATE", late).replace("KEYS", keys).replace("  sum =", f"{extra}  sum =")
    return small_graph(text, weights={"w": np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)})


def feeds() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(1)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in {"x": (2, 3, 4), "t": (2,), "p": (2, 5, 4)}.items()
    }


def names(values: Iterable[ir.Value | None]) -> list[str | None]:
    return [value.name for value in values if value is not None]


def prompt(model: ir.Model) -> ir.Model:
    return extract_subgraph(model, keep_inputs=["p"], inputs={}, outputs={"keys": "keys_of_p"})


def loop(model: ir.Model) -> ir.Model:
    return extract_subgraph(model, keep_inputs=["x"], inputs={"sine": TIME, "keys": KEYS}, outputs={"y": "y"})


def test_boundary_values_are_the_last_that_depend_on_one_input() -> None:
    assert names(boundary_values(whole(), ["p"])) == ["keys"], "reading the batch size from t is no dependence on t"
    assert names(boundary_values(whole(), ["t"])) == ["sine"], "a new axis costs nothing and is repeated"


def test_parts_together_compute_the_same_as_the_whole(tmp_path: Path) -> None:
    given = feeds()
    expected = run(whole(), tmp_path, given)["y"]
    time = extract_subgraph(whole(), keep_inputs=["t"], inputs={}, outputs={"sine": "time"})
    made = {**run(time, tmp_path, {"t": given["t"]}), **run(prompt(whole()), tmp_path, {"p": given["p"]})}
    assert made.keys() == {"time", "keys_of_p"}
    assert np.array_equal(run(loop(whole()), tmp_path, {"x": given["x"], **made})["y"], expected)


def test_a_part_has_the_nodes_that_its_outputs_need() -> None:
    model = whole()
    keys, rest = prompt(model), loop(model)
    assert names(keys.graph.inputs) == ["p"]
    assert sorted(node.op_type for node in keys.graph) == ["Concat", "MatMul", "Reshape", "Shape"]
    assert set(keys.graph.initializers) == {"rest", "four", "w"}
    assert names(rest.graph.inputs) == ["x", "time", "keys_of_p"]
    assert {node.name for node in rest.graph}.isdisjoint({"block/column", "block/sine", "block/linear", "block/keys"})
    assert set(rest.graph.initializers) == {"one", "rest", "four", "w"}
    assert rest.graph.initializers["w"].const_value is keys.graph.initializers["w"].const_value


def test_sizes_are_read_from_the_inputs_of_a_part() -> None:
    for part, source in ((prompt(whole()), "p"), (loop(whole()), "x")):
        (read,) = [node for node in part.graph if node.op_type == "Shape"]
        assert names(read.inputs) == [source]
        assert (read.attributes["start"].as_int(), read.attributes["end"].as_int()) == (0, 1)


def test_a_value_that_needs_a_size_of_the_rest_is_not_a_boundary() -> None:
    extra = "  high = Shape<start = 1, end = 2>(x)\n  many = Expand(keys, high)\n"
    assert names(boundary_values(whole(keys="many", extra=extra), ["p"])) == ["keys"]


def test_only_float_values_are_boundary_values() -> None:
    extra = "  whole = Cast<to = 7>(keys)\n  back = Cast<to = 1>(whole)\n"
    assert names(boundary_values(whole(keys="back", extra=extra), ["p"])) == ["keys"]
    extra = "  high = Shape(keys)\n  size = Cast<to = 1>(high)\n  length = ReduceSum<keepdims = 0>(size)\n"
    assert names(boundary_values(whole(keys="length", extra=extra), ["p"])) == ["length"]


def test_a_half_boundary_value_is_float32_and_exact() -> None:
    extra = "  half = Cast<to = 10>(keys)\n  third = Mul(half, half)\n  single = Cast<to = 1>(third)\n"
    model = whole(keys="single", extra=extra)
    (value,) = boundary_values(model, ["p"])
    assert (value.name, value.dtype) == ("third", ir.DataType.FLOAT16)
    first = extract_subgraph(model, keep_inputs=["p"], inputs={}, outputs={"third": "keys_of_p"})
    second = extract_subgraph(model, keep_inputs=["x", "t"], inputs={"third": KEYS}, outputs={"y": "y"})
    assert first.graph.outputs[0].dtype == second.graph.inputs[2].dtype == ir.DataType.FLOAT
    given = feeds()
    expected, keys = by_definition(model, given), by_definition(first, given)
    assert np.array_equal(by_definition(second, {**given, "keys_of_p": keys}), expected)


def by_definition(model: ir.Model, given: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return a model's only output from ONNX's reference, which computes each node as its operator is defined."""
    (found,) = ReferenceEvaluator(ir.to_proto(model)).run([str(model.graph.outputs[0].name)], given)
    return np.asarray(found, np.float32)


def test_unused_inputs_are_dropped() -> None:
    unused = {"sine": TIME, "sum": TensorSpec("sum_of_all", "float32", ("B", "L", 4)), "keys": KEYS}
    part = extract_subgraph(whole(), keep_inputs=["x"], inputs=unused, outputs={"y": "y"})
    assert names(part.graph.inputs) == ["x", "time", "sum_of_all"], "the batch is read from x"


def test_the_whole_is_not_modified() -> None:
    model = whole()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    boundary_values(model, ["p"])
    loop(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_an_input_that_the_rest_reads_is_rejected() -> None:
    with pytest.raises(ExportError, match="block/late reads the input t"):
        boundary_values(whole(late="t"), ["t"])
    with pytest.raises(ExportError, match="block/column reads the input t"):
        boundary_values(whole(late="column"), ["t"])


def test_an_output_that_depends_on_another_input_is_rejected() -> None:
    with pytest.raises(ExportError, match="y depends on t"):
        extract_subgraph(whole(), keep_inputs=["x"], inputs={"keys": KEYS}, outputs={"y": "y"})

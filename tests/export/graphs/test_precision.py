"""Which nodes compute in half, by the types in the graph: ONNX Runtime's CPU computes half in float32, so results there
do not show an overflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt_export.graphs.precision import (
    RANGE_LIMIT,
    SMALLEST_RANGE,
    compute_in_float32,
    compute_in_half,
    measure_ranges,
    select_float32_nodes,
    select_float32_weights,
)
from tests.export.graphs.test_trace import Small
from tests.export.small_graph import run, small_graph
from tests.exported import Exported

Arrays = dict[str, NDArray[Any]]
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
X: Arrays = {"x": np.linspace(-1, 1, 8, dtype=np.float32).reshape(2, 4)}
W = np.eye(4, dtype=np.float32)
# One layer between two weights, the shape of everything here.
LAYERS = "g (float[B,4] x, float[4,4] w) => (float[B,4] y) { a = MatMul(x, w) MIDDLE y = MatMul(z, w) }"


def halved(
    model: ir.Model, folder: Path, feeds: Arrays = X, *, float32_inputs: frozenset[str] = frozenset()
) -> tuple[str, ...]:
    """Rewrite as the exporter does; return the nodes that compute in float32 according to it."""
    weights = [name for name in model.graph.initializers if name.startswith("w")]
    ranges, _ = measure_ranges(model, folder, [feeds], weights)
    kept = select_float32_nodes(model, ranges)
    found = compute_in_half(model, weights, float32_inputs=float32_inputs, float32_nodes=kept, ranges=ranges)
    for name in weights:
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=name)  # type: ignore[union-attr]
    return found


def layers(middle: str, *, weight: NDArray[np.float32] = W, own: tuple[str, ...] = ()) -> ir.Model:
    return small_graph(LAYERS.replace("MIDDLE", middle), weights={"w": weight}, own=own)


def dtype(model: ir.Model, name: str) -> ir.DataType | None:
    return next(value.dtype for node in model.graph for value in node.outputs if value.name == name)


def computed_in_float32(model: ir.Model) -> set[str]:
    """Find the nodes with a float32 input or output by an independent walk, except casts and Resize's fixed inputs."""
    found = set()
    for node in model.graph:
        fixed = (1, 2) if node.op_type == "Resize" else ()
        values = [value for index, value in enumerate(node.inputs) if value is not None and index not in fixed]
        if node.op_type not in ("Cast", "Shape") and FLOAT in {value.dtype for value in (*values, *node.outputs)}:
            found.add(str(node.name))
    return found


def test_without_overflow_nothing_is_float32(tmp_path: Path) -> None:
    model = layers("b = Relu(a) z = Add(b, a)")
    assert halved(model, tmp_path) == ()
    assert computed_in_float32(model) == set()


def test_an_overflow_stays_float32_at_its_nodes_alone(tmp_path: Path) -> None:
    text = """
    g (float[B,4] x, float[4,4] w) => (float[B,4] y) <float large = {30000}, float small = {0.00003}> {
      a = MatMul(x, w) big = Mul(a, large) b = Mul(big, small) y = MatMul(b, w)
    }"""
    feeds: Arrays = {"x": X["x"] * 4}
    expected = run(small_graph(text, weights={"w": W}), tmp_path, feeds)["y"]
    model = small_graph(text, weights={"w": W})
    # The one that makes the product and the one that takes it; their neighbours compute in half.
    assert halved(model, tmp_path, feeds) == ("block/big", "block/b")
    assert computed_in_float32(model) == {"block/big", "block/b"}
    assert (dtype(model, "a"), dtype(model, "big")) == (HALF, FLOAT)
    # Half resolves 2⁻¹¹ of a value, which is at most 4 here, and each of two products and three casts rounds once.
    assert np.abs(run(model, tmp_path, feeds)["y"] - expected).max() < 5 * 4 * 2**-11


@pytest.mark.parametrize(("largest", "kept"), [(16375, ()), (16377, ("block/a", "block/z", "block/y"))])
def test_the_limit_leaves_two_bits_of_headroom(tmp_path: Path, largest: float, kept: tuple[str, ...]) -> None:
    assert RANGE_LIMIT == 65504 / 4 == 16376
    model = layers("z = Relu(a)")
    assert halved(model, tmp_path, {"x": np.full((1, 4), largest, np.float32)}) == kept


def test_nodes_that_depend_on_a_float32_input_alone_stay_float32(tmp_path: Path) -> None:
    """The sines of a timestep lose everything in half: 999 and 999.4 are the same number there."""
    text = (
        "g (float[B,4] timestep, float[4,4] w) => (float[B,4] y) "
        "{ angle = Mul(timestep, timestep) sine = Sin(angle) z = MatMul(sine, w) y = Relu(z) }"
    )
    model = small_graph(text, weights={"w": W})
    feeds: Arrays = {"timestep": X["x"]}
    kept = halved(model, tmp_path, feeds, float32_inputs=frozenset({"timestep"}))
    assert kept == ("block/angle", "block/sine")
    assert (dtype(model, "sine"), dtype(model, "z")) == (FLOAT, HALF)
    assert computed_in_float32(model) == {"block/angle", "block/sine"}


def test_nodes_that_depend_on_pixels_alone_stay_float32(tmp_path: Path) -> None:
    """Also behind a value that is too large for half: the classifier's preprocessing counts in whole pixels."""
    text = """
    g (uint8[B,4] pixels, float[4,4] w) => (float[B,4] y) <float scale = {60000}> {
      seen = Cast<to = 1>(pixels)
      large = Mul(seen, scale)
      small = Div(large, scale)
      rounded = Floor(small)
      z = MatMul(rounded, w)
      y = Relu(z)
    }"""
    model = small_graph(text, weights={"w": W})
    kept = halved(model, tmp_path, {"pixels": np.full((1, 4), 255, np.uint8)})
    assert kept == ("block/large", "block/small", "block/rounded")
    assert dtype(model, "z") == HALF


def test_our_own_arithmetic_stays_float32(tmp_path: Path) -> None:
    model = layers("b = Relu(a) c = Sigmoid(b) z = Neg(c)", own=("b", "c"))
    assert halved(model, tmp_path) == ("/b", "/c")
    assert [dtype(model, name) for name in "abcz"] == [HALF, FLOAT, FLOAT, HALF]


def test_a_border_is_crossed_once(tmp_path: Path) -> None:
    model = layers("b = Relu(a) c = Sigmoid(a) d = Add(b, c) z = Neg(d)", own=("b", "c"))
    halved(model, tmp_path)
    casts = [node.inputs[0].name for node in model.graph if node.op_type == "Cast"]  # type: ignore[union-attr]
    assert sorted(map(str, casts)) == ["a", "b", "c", "x", "y/half"]


def test_inputs_and_outputs_stay_float32(tmp_path: Path) -> None:
    model = layers("z = Relu(a)")
    halved(model, tmp_path)
    assert [(value.name, value.dtype) for value in model.graph.inputs] == [("x", FLOAT)]
    assert [(value.name, value.dtype) for value in model.graph.outputs] == [("y", FLOAT)]


def test_constants_are_converted(tmp_path: Path) -> None:
    text = "g (float[B,4] x, float[4,4] w) => (float[B,4] y) <float c = {0.33333}> { a = MatMul(x, w) y = Mul(a, c) }"
    model = small_graph(text, weights={"w": W})
    halved(model, tmp_path)
    product = next(node for node in model.graph if node.op_type == "Mul")
    assert product.inputs[1] is not None
    assert product.inputs[1].const_value is not None
    assert product.inputs[1].const_value.numpy().dtype == np.float16


def test_a_constant_that_half_cannot_hold_stays_float32(tmp_path: Path) -> None:
    text = "g (float[B,4] x, float[4,4] w) => (float[B,4] y) <float c = {100000.0}> { a = MatMul(x, w) y = Mul(a, c) }"
    model = small_graph(text, weights={"w": W})
    assert halved(model, tmp_path, {"x": np.full((1, 4), 1e-3, np.float32)}) == ("block/y",)


def test_a_value_that_vanishes_in_half_stays_float32_at_its_nodes_alone(tmp_path: Path) -> None:
    """As one that overflows: the scales are within half's range, their product is not."""
    text = """
    g (float[B,4] x, float[4,4] w) => (float[B,4] y) <float small = {0.0001}, float large = {10000}> {
      a = MatMul(x, w) s = Mul(a, small) t = Mul(s, small) b = Mul(t, large) y = MatMul(b, w)
    }"""
    feeds: Arrays = {"x": X["x"] * 2}
    model = small_graph(text, weights={"w": W})
    assert halved(model, tmp_path, feeds) == ("block/t", "block/b")
    assert computed_in_float32(model) == {"block/t", "block/b"}
    assert (dtype(model, "s"), dtype(model, "t"), dtype(model, "b")) == (HALF, FLOAT, FLOAT)


@pytest.mark.parametrize(
    ("largest", "kept"), [(2**-14, ()), (0.9 * 2**-14, ("block/a", "block/z", "block/y")), (0, ())]
)
def test_the_smallest_normal_number_is_the_limit_below(tmp_path: Path, largest: float, kept: tuple[str, ...]) -> None:
    assert SMALLEST_RANGE == 2**-14
    assert halved(layers("z = Relu(a)"), tmp_path, {"x": np.full((1, 4), largest, np.float32)}) == kept


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_value_that_is_not_finite_stays_float32(tmp_path: Path, value: float) -> None:
    model = layers("z = Relu(a)")
    ranges, _ = measure_ranges(model, tmp_path, [{"x": np.array([[1, 1, 1, value]], np.float32)}], ["w"])
    assert ranges["a"] == np.inf
    assert "block/a" in select_float32_nodes(model, ranges)


def test_nodes_that_read_a_weight_in_float32_stay_float32(tmp_path: Path) -> None:
    """Also through a node that rearranges it."""
    text = """
    g (float[B,4] x, float[4,4] w, float[4,4] v) => (float[B,4] y) {
      a = MatMul(x, w) u = Transpose(v) b = MatMul(a, u) z = Relu(b) y = MatMul(z, w)
    }"""
    model = small_graph(text, weights={"w": W, "v": W})
    ranges, _ = measure_ranges(model, tmp_path, [X], ["w", "v"])
    nodes = select_float32_nodes(model, ranges, {"v"})
    assert nodes == ("block/u", "block/b")
    compute_in_half(model, ["w"], float32_inputs=frozenset(), float32_nodes=nodes, ranges=ranges)
    assert [dtype(model, name) for name in "aubz"] == [HALF, FLOAT, FLOAT, HALF]
    assert model.graph.initializers["v"].dtype == FLOAT
    assert not any(name.startswith("v/") for name in model.graph.initializers), "no constant in half of it"


class Weighted(Small):
    """Two layers, of which one has weights and a bias of a size."""

    def __init__(self, weight: float, bias: float) -> None:
        super().__init__()
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
        self.first.weight.data *= weight
        self.first.bias.data *= bias


@pytest.mark.parametrize(
    ("weight", "bias", "output", "lost"),
    [
        (1, 1, 1.0, set()),
        (1e-4, 1, 1.0, set()),  # ten bits are left
        (1e-6, 1, 1.0, {"renamed.weight"}),
        (1e-9, 1, 1.0, {"renamed.weight"}),
        (1e5, 1, 1e5, {"renamed.weight"}),
        (1, 1e-7, 1.0, set()),  # added to a number of about 1
        (1, 1e-7, 1e-6, {"renamed.bias"}),
        (1, 1e5, 1e5, {"renamed.bias"}),
        (0, 0, 0.0, set()),
    ],
)
def test_weights_that_half_cannot_hold(weight: float, bias: float, output: float, lost: set[str]) -> None:
    module = Weighted(weight, bias).requires_grad_(False)
    assert select_float32_weights(module, {"first": output, "second": 1.0}) == lost


def test_infinities_of_a_mask_are_ignored(tmp_path: Path) -> None:
    text = """
    g (float[4,4] x, float[4,4] w) => (float[4,4] y) <float[4] mask = {0, 0, 0, -inf}> {
      a = MatMul(x, w) masked = Add(a, mask) p = Softmax<axis = -1>(masked) y = MatMul(p, w)
    }"""
    model = small_graph(text.replace("-inf", "-1"), weights={"w": W})
    mask = model.graph.initializers["mask"]
    mask.const_value = ir.tensor(np.array([0, 0, 0, -np.inf], np.float32), name="mask")
    feeds: Arrays = {"x": np.ones((4, 4), np.float32)}
    assert halved(model, tmp_path, feeds) == ()
    assert np.allclose(run(model, tmp_path, feeds)["y"], [1 / 3, 1 / 3, 1 / 3, 0], atol=2**-11)


def test_the_scales_of_a_resize_stay_float32(tmp_path: Path) -> None:
    text = """
    g (float[1,1,4,4] x, float[1,1,1,1] w) => (float[1,1,8,8] y) <float[4] scales = {1, 1, 2, 2}> {
      a = Mul(x, w) y = Resize<mode = "nearest">(a, , scales)
    }"""
    model = small_graph(text, weights={"w": np.ones((1, 1, 1, 1), np.float32)})
    feeds: Arrays = {"x": np.arange(16, dtype=np.float32).reshape(1, 1, 4, 4)}
    assert halved(model, tmp_path, feeds) == ()
    resize = next(node for node in model.graph if node.op_type == "Resize")
    assert [value.dtype for value in resize.inputs if value is not None] == [HALF, FLOAT]
    assert np.array_equal(run(model, tmp_path, feeds)["y"][0, 0, ::2, ::2], feeds["x"][0, 0])


def test_the_float32_companion_computes_with_the_half_weights(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float16)
    expected = run(layers("z = Relu(a)", weight=weight.astype(np.float32)), tmp_path, X)["y"]
    model = layers("z = Relu(a)", weight=weight.astype(np.float32))
    compute_in_float32(model, ["w"])
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    assert np.array_equal(run(model, tmp_path, X)["y"], expected)
    assert [node.op_type for node in model.graph].count("Cast") == 1
    assert all(value.dtype == FLOAT for node in model.graph for value in node.outputs)


# Ranges


def test_ranges_are_the_largest_over_all_inputs(tmp_path: Path) -> None:
    model = layers("z = Neg(a)")
    feeds: list[Arrays] = [{"x": np.full((1, 4), value, np.float32)} for value in (2.0, -7.0, 3.0)]
    ranges, _ = measure_ranges(model, tmp_path, feeds, ["w"])
    assert ranges == {"x": 7.0, "a": 7.0, "z": 7.0, "y": 7.0}
    assert not (tmp_path / "ranges.onnx").exists()
    assert len(model.graph) == 3


# What was exported


@pytest.mark.parametrize("name", ["text_encoder", "vae_encoder", "vae_decoder", "unet", "safety_checker"])
def test_the_manifest_names_the_float32_nodes(sd2: Exported, name: str) -> None:
    record = Bundle.open(sd2.bundle).manifest.components[name].graphs["float16"]
    model = ir.from_proto(onnx.load(sd2.bundle / record.file, load_external_data=False))
    assert computed_in_float32(model) == set(record.float32_nodes)
    if name == "unet":
        assert {node.split("/")[0] for node in record.float32_nodes} == {"time_proj"}
    if name == "safety_checker":
        inside = [node for node in model.graph if str(node.name).startswith("preprocessing/")]
        made = {value.dtype for node in inside if node.op_type != "Cast" for value in node.outputs}
        assert FLOAT in made
        assert HALF not in made

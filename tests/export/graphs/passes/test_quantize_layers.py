"""Quantised layers on ONNX Runtime and on OpenVINO, compared with integer arithmetic in numpy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import openvino
import pytest
from numpy.typing import NDArray

from latentrt.backends.openvino import _mark_decompression
from latentrt_export.graphs.passes.quantize_layers import QuantizeLayers
from latentrt_export.quantize.layers import LayerMethod, weight_limit
from tests.export.small_graph import operators, run, small_graph

Floats = NDArray[np.float32]
Ints = NDArray[np.int8]

# ONNX's text form has no dots in names, which layers have.
CONV = """
g (float[B,32,H,W] x, float[8,32,1,1] layer_weight, float[8] layer_bias) => (float[B,8,H,W] y) {
  c = Conv<kernel_shape = [1,1]>(x, layer_weight, layer_bias)
  y = Identity(c)
}
"""
MATMUL = """
g (float[B,T,32] x, float[8,32] layer_weight, float[8] layer_bias) => (float[B,T,8] y) {
  w = Transpose<perm = [1,0]>(layer_weight)
  m = MatMul(x, w)
  y = Add(m, layer_bias)
}
"""
# Steps of the conv's output. The largest sums of 32 products of 255 and 63 lie within 128 of them.
OUTPUT_SCALE = 8192.0


def layer(text: str, integers: Ints, bias: Floats, method: LayerMethod, scale: float = 2.0) -> ir.Model:
    """A model of one quantised layer, whose input is rounded to whole numbers from 0 to 255."""
    shape = (*integers.shape, 1, 1) if "Conv" in text else integers.shape
    floats = {"layer_weight": np.zeros(shape, np.float32), "layer_bias": bias}
    model = small_graph(text, weights=floats)
    for name in floats:
        value = model.graph.initializers.pop(name)
        value.name = name.replace("_", ".")
        model.graph.initializers[value.name] = value
    scales = np.full(8, scale, np.float32)
    stored: dict[str, NDArray[Any]] = {
        "layer.weight": integers.reshape(shape),
        "layer.weight_scale": scales if method == "static" else scales.reshape(-1, *(1 for _ in shape[1:])),
        "layer.input_scale": np.float32(1.0) * np.ones((), np.float32),
        "layer.input_zero_point": np.zeros((), np.uint8),
        "layer.output_scale": np.full((), OUTPUT_SCALE, np.float32),
        "layer.output_zero_point": np.full((), 128, np.uint8),
    }
    QuantizeLayers({"layer": method}, lambda name: ir.tensor(stored[name], name=name))(model)
    return model


def on_onnxruntime(model: ir.Model, folder: Path, x: Floats) -> Floats:
    found: Floats = run(model, folder, {"x": x})["y"]
    return found


def on_openvino(model: ir.Model, folder: Path, x: Floats) -> Floats:
    found: Floats = compile_model(model, folder, x.shape)({"x": x})["y"]
    return found


def compile_model(model: ir.Model, folder: Path, shape: tuple[int, ...]) -> Any:
    ir.save(model, folder / "model.onnx")
    return compile_file(folder / "model.onnx", "x", shape)


def compile_file(path: Path, source: str, shape: tuple[int, ...]) -> Any:
    """Compile a graph for an input shape with OpenVINO, as the runtime does."""
    core = openvino.Core()
    graph = core.read_model(path)
    graph.reshape({source: list(shape)})
    _mark_decompression(graph)
    return core.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})


Backend = Callable[[ir.Model, Path, Floats], Floats]
BACKENDS = pytest.mark.parametrize("backend", [on_onnxruntime, on_openvino])


def expected(x: Floats, integers: Ints, bias: Floats, axis: int) -> NDArray[np.float64]:
    """Return Σ x · w in integers, then scaled; `axis` is that of channels."""
    sums = np.tensordot(np.rint(x).astype(np.int64), integers.astype(np.int64), axes=([axis], [1]))
    wanted: NDArray[np.float64] = np.moveaxis(sums.astype(np.float64) * 2.0 + bias.astype(np.float64), -1, axis)
    return wanted


def worst_weights() -> Ints:
    """Return weights with the largest sums of two products, of both signs, and random ones."""
    integers = np.full((8, 32), weight_limit("static"), np.int8)
    integers[1] *= -1
    integers[2:] = np.random.default_rng(0).integers(-63, 64, (6, 32))
    return integers


@BACKENDS
def test_the_largest_products_do_not_overflow_in_a_linear_layer(backend: Backend, tmp_path: Path) -> None:
    """CPUs without VNNI add two products in 16 bits; 2 · 255 · 63 fits, 2 · 255 · 127 saturates."""
    assert 2 * 255 * weight_limit("static") <= np.iinfo(np.int16).max
    x, bias = np.full((2, 5, 32), 255, np.float32), np.arange(8, dtype=np.float32)
    model = layer(MATMUL, worst_weights(), bias, "static")
    # Sums below 2²⁴ are exact in float32.
    np.testing.assert_array_equal(backend(model, tmp_path, x), expected(x, worst_weights(), bias, 2))


@BACKENDS
def test_the_largest_products_do_not_overflow_in_a_convolution(backend: Backend, tmp_path: Path) -> None:
    x, bias = np.full((2, 32, 4, 5), 255, np.float32), 1000 * np.arange(8, dtype=np.float32)
    model = layer(CONV, worst_weights(), bias, "static")
    found = backend(model, tmp_path, x)
    assert np.array_equal(found, np.rint(found / OUTPUT_SCALE) * OUTPUT_SCALE)
    # What is stored as uint8 is half a step off at most, and the bias half a step of the sums.
    assert np.abs(found - expected(x, worst_weights(), bias, 1)).max() <= OUTPUT_SCALE / 2 + 1.0


@BACKENDS
@pytest.mark.parametrize(("text", "axis", "shape"), [(MATMUL, 2, (2, 5, 32)), (CONV, 1, (2, 32, 4, 5))])
def test_int8_weights_alone_leave_activations_exact(
    backend: Backend, tmp_path: Path, text: str, axis: int, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-127, 128, (8, 32)).astype(np.int8)
    x, bias = rng.normal(size=shape).astype(np.float32), rng.normal(size=8).astype(np.float32)
    model = layer(text, integers, bias, "weights")
    assert "QuantizeLinear" not in operators(model)
    sums = np.tensordot(x.astype(np.float64), integers.astype(np.float64), axes=([axis], [1]))
    wanted = np.moveaxis(sums * 2.0 + bias, -1, axis)
    # float32's own rounding of sums of 32 products.
    np.testing.assert_allclose(backend(model, tmp_path, x), wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("text", "integer", "floating"), [(MATMUL, "MatMulIntegerToFloat", "MatMul"), (CONV, "QLinearConv", "Conv")]
)
def test_onnxruntime_multiplies_integers(tmp_path: Path, text: str, integer: str, floating: str) -> None:
    """It fuses such operators only from certain patterns."""
    model = layer(text, worst_weights(), np.zeros(8, np.float32), "static")
    ir.save(model, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds[integer] == 1
    assert floating not in kinds


@pytest.mark.parametrize(
    ("text", "shape", "kind"), [(MATMUL, (2, 5, 32), "FullyConnected"), (CONV, (2, 32, 4, 5), "Convolution")]
)
def test_openvino_multiplies_integers(tmp_path: Path, text: str, shape: tuple[int, ...], kind: str) -> None:
    model = compile_model(layer(text, worst_weights(), np.zeros(8, np.float32), "static"), tmp_path, shape)
    nodes = [node.get_rt_info() for node in model.get_runtime_model().get_ops()]
    (found,) = (node for node in nodes if node["layerType"].value == kind)
    assert found["runtimePrecision"].value in ("u8", "i8")


def test_a_layer_without_a_stored_weight_is_not_changed() -> None:
    model = small_graph(MATMUL, weights={"layer_weight": np.ones((8, 32), np.float32)})
    before = operators(model)
    assert not QuantizeLayers({"layer": "static"}, lambda name: pytest.fail(name))(model).modified
    assert operators(model) == before


def test_a_value_that_two_layers_read_is_rounded_once(tmp_path: Path) -> None:
    text = """
    g (float[B,32] x, float[8,32] a_weight, float[8,32] b_weight) => (float[B,8] y) {
      s = Sigmoid(x)
      v = Transpose<perm = [1,0]>(a_weight)
      w = Transpose<perm = [1,0]>(b_weight)
      p = MatMul(s, v)
      q = MatMul(s, w)
      y = Add(p, q)
    }
    """
    ones = np.ones((8, 32), np.float32)
    model = small_graph(text, weights={"a_weight": ones, "b_weight": ones})
    for name in ("a", "b"):
        value = model.graph.initializers.pop(f"{name}_weight")
        value.name = f"{name}.weight"
        model.graph.initializers[value.name] = value
    stored: dict[str, NDArray[Any]] = {}
    for name in ("a", "b"):
        stored[f"{name}.weight"] = np.ones((8, 32), np.int8)
        stored[f"{name}.weight_scale"] = np.ones(8, np.float32)
        stored[f"{name}.input_scale"] = np.full((), 1 / 255, np.float32)
        stored[f"{name}.input_zero_point"] = np.zeros((), np.uint8)
    methods: dict[str, LayerMethod] = {"a": "static", "b": "static"}
    QuantizeLayers(methods, lambda name: ir.tensor(stored[name], name=name))(model)
    assert operators(model).count("QuantizeLinear") == 1
    x = np.linspace(-4, 4, 64, dtype=np.float32).reshape(2, 32)
    # Each of 64 values is half a step of 1/255 off at most.
    wanted = 2 * (1 / (1 + np.exp(-x))).sum(1, keepdims=True)
    np.testing.assert_allclose(run(model, tmp_path, {"x": x})["y"], np.tile(wanted, 8), rtol=0, atol=32 / 255)

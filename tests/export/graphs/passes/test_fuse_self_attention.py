"""Self-attention is fused to one operator, which gives the same values on both backends of a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import openvino
from numpy.typing import NDArray

from latentrt_export.graphs.passes.fuse_self_attention import DOMAIN, FuseSelfAttention
from tests.export.small_graph import operators, run, small_graph

# Two heads of four channels. Keys and values are projections of KEYS.
ATTENTION = """
g (float[B,N,8] x, float[B,M,8] text, float[8,8] wq, float[8,8] wk, float[8,8] wv) => (float[B,N,8] y)
  <float scale = {0.7}, int64[4] apart = {0, -1, 2, 4}, int64[3] together = {0, -1, 8}> {
  q = MatMul(x, wq)
  k = MatMul(KEYS, wk)
  v = MatMul(KEYS, wv)
  q4 = Reshape(q, apart)
  k4 = Reshape(k, apart)
  v4 = Reshape(v, apart)
  qh = Transpose<perm = [0, 2, 1, 3]>(q4)
  kh = Transpose<perm = [0, 2, 1, 3]>(k4)
  vh = Transpose<perm = [0, 2, 1, 3]>(v4)
  kt = Transpose<perm = [0, 1, 3, 2]>(kh)
  qs = Mul(qh, scale)
  other = ReduceMax<keepdims = 0>(wq)
  ks = Mul(kt, FACTOR)
  scores = MatMul(qs, ks)
  p = Softmax<axis = -1>(scores)
  m = MatMul(p, vh)
  mt = Transpose<perm = [0, 2, 1, 3]>(m)
  r = Reshape(mt, together)
  y = Neg(r)
}
"""


def attention(keys: str = "x", factor: str = "scale") -> ir.Model:
    return small_graph(ATTENTION.replace("KEYS", keys).replace("FACTOR", factor))


def feeds() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 5, 8), "text": (2, 5, 8), "wq": (8, 8), "wk": (8, 8), "wv": (8, 8)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_self_attention_becomes_one_operator(tmp_path: Path) -> None:
    expected = run(attention(), tmp_path, feeds())["y"]
    model = attention()
    assert FuseSelfAttention()(model).modified
    assert operators(model) == ["MatMul", "MatMul", "MatMul", "MultiHeadAttention", "Neg"]
    assert model.opset_imports[DOMAIN] == 1
    # 1e-5: sums of a softmax in blocks, of values of about 10.
    np.testing.assert_allclose(run(model, tmp_path, feeds())["y"], expected, atol=1e-5)
    ir.save(model, tmp_path / "fused.onnx")
    compiled = openvino.Core().compile_model(tmp_path / "fused.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = {value.any_name: feeds()[value.any_name] for value in compiled.inputs}
    np.testing.assert_allclose(compiled(given)["y"], expected, atol=1e-5)


def test_cross_attention_is_not_changed() -> None:
    model = attention(keys="text")
    before = operators(model)
    assert not FuseSelfAttention()(model).modified
    assert operators(model) == before
    assert DOMAIN not in model.opset_imports


def test_a_factor_that_is_not_constant_is_not_changed() -> None:
    model = attention(factor="other")
    before = operators(model)
    assert not FuseSelfAttention()(model).modified
    assert operators(model) == before

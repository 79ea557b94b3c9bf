"""The transposition of attention keys becomes one Transpose; other reshapes stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentrt_export.graphs.passes.transpose_keys import TransposeKeys
from tests.export.small_graph import operators, run, small_graph

DETOUR = """
g (float[B,4,L,8] k, float[B,4,M,8] q) => (float[B,4,M,N] y)
<int64[1] rest = {-1}, int64[1] zero = {0}, int64[1] m2 = {-2}, int64[1] m1 = {-1},
 int64[1] end = {9223372036854775807}> {
  shape = Shape(k)
  heads = Slice(shape, zero, m2)
  length = Slice(shape, m2, m1)
  width = Slice(shape, m1, end)
  flat_target = Concat<axis = 0>(rest, FLAT)
  flat = Reshape(SOURCE, flat_target)
  swapped = Transpose<perm = [PERM]>(flat)
  end_target = Concat<axis = 0>(heads, END)
  keys = Reshape(swapped, end_target)
  y = MatMul(q, keys)
}
"""


def detour(
    flat: str = "length, width", end: str = "width, length", perm: str = "0, 2, 1", source: str = "k"
) -> ir.Model:
    text = DETOUR.replace("FLAT", flat).replace("END", end).replace("PERM", perm).replace("SOURCE", source)
    return small_graph(text)


def test_keys_are_transposed_directly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    feeds = {"k": rng.normal(size=(2, 4, 5, 8)), "q": rng.normal(size=(2, 4, 3, 8))}
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    expected = run(detour(), tmp_path, feeds)["y"]
    model = detour()
    assert TransposeKeys()(model).modified
    product = model.graph.outputs[0].producer()
    assert product is not None
    transpose = product.inputs[1].producer()  # type: ignore[union-attr]
    assert transpose is not None
    assert list(transpose.attributes["perm"].as_ints()) == [0, 1, 3, 2]
    assert np.array_equal(run(model, tmp_path, feeds)["y"], expected)


@pytest.mark.parametrize(
    "lookalike",
    [
        {"flat": "width, length"},
        {"end": "length, width"},
        {"perm": "0, 1, 2"},
        {"flat": "length, width", "end": "width, width"},
    ],
    ids=["flattened-otherwise", "unflattened-otherwise", "not-swapped", "another-size"],
)
def test_other_reshapes_stay(lookalike: dict[str, str]) -> None:
    model = detour(**lookalike)
    before = operators(model)
    assert not TransposeKeys()(model).modified
    assert operators(model) == before


def test_sizes_of_another_value_are_not_the_keys() -> None:
    text = DETOUR.replace("FLAT", "length, width").replace("END", "width, length").replace("PERM", "0, 2, 1")
    model = small_graph(text.replace("SOURCE", "other").replace("shape = Shape(k)", "other = Neg(k) shape = Shape(k)"))
    assert not TransposeKeys()(model).modified

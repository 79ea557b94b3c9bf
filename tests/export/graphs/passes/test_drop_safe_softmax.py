"""The guard of softmax is dropped, and only that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentrt_export.graphs.passes.drop_safe_softmax import DropSafeSoftmax
from tests.export.small_graph import operators, run, small_graph

GUARDED = """
g (float[B,4] x) => (float[B,4] y) <float zero = {ZERO}> {
  p = Softmax<axis = -1>(x)
  other = Sigmoid(x)
  unsure = IsNaN(TESTED)
  kept = Where(unsure, zero, KEPT)
  y = Neg(kept)
}
"""


def guarded(zero: str = "0.0", tested: str = "p", kept: str = "p") -> ir.Model:
    return small_graph(GUARDED.replace("ZERO", zero).replace("TESTED", tested).replace("KEPT", kept))


def test_the_guard_is_dropped(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    expected = run(guarded(), tmp_path, {"x": x})["y"]
    model = guarded()
    assert DropSafeSoftmax()(model).modified
    assert model.graph.outputs[0].producer().inputs[0].producer().op_type == "Softmax"  # type: ignore[union-attr]
    assert np.array_equal(run(model, tmp_path, {"x": x})["y"], expected)


@pytest.mark.parametrize(
    "lookalike",
    [{"zero": "1.0"}, {"tested": "other"}, {"kept": "other"}, {"tested": "other", "kept": "other"}],
    ids=["not-zero", "tests-another", "keeps-another", "no-softmax"],
)
def test_another_where_stays(lookalike: dict[str, str]) -> None:
    model = guarded(**lookalike)
    before = operators(model)
    assert not DropSafeSoftmax()(model).modified
    assert operators(model) == before


def test_a_guard_that_is_the_output_stays() -> None:
    model = small_graph(
        "g (float[B,4] x) => (float[B,4] y) <float zero = {0.0}> "
        "{ p = Softmax<axis = -1>(x) unsure = IsNaN(p) y = Where(unsure, zero, p) }"
    )
    assert not DropSafeSoftmax()(model).modified

"""Each rewrite alone: what it rewrites means the same afterwards, and what only looks like it is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentrt_export.graphs.passes.key_transpose import TransposeKeysDirectly
from latentrt_export.graphs.passes.names import NameNodes
from latentrt_export.graphs.passes.safe_softmax import DropSafeSoftmax
from tests.export.small_graph import operators, run, small_graph

# Softmax

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


def test_the_softmax_guard_goes(tmp_path: Path) -> None:
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


# Keys

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
    assert TransposeKeysDirectly()(model).modified
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
    assert not TransposeKeysDirectly()(model).modified
    assert operators(model) == before


def test_sizes_of_another_value_are_not_the_keys() -> None:
    text = DETOUR.replace("FLAT", "length, width").replace("END", "width, length").replace("PERM", "0, 2, 1")
    model = small_graph(text.replace("SOURCE", "other").replace("shape = Shape(k)", "other = Neg(k) shape = Shape(k)"))
    assert not TransposeKeysDirectly()(model).modified


# Names


def scoped(*scopes: str | None) -> ir.Model:
    """A chain of Relu, each from the module of this path; None for a node that a pass made."""
    values = " ".join(f"v{index + 1} = Relu(v{index})" for index in range(len(scopes)))
    model = small_graph(f"g (float[B] v0) => (float[B] v{len(scopes)}) {{ {values} }}")
    for node, scope in zip(model.graph, scopes, strict=True):
        node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/someone/site-packages/x.py", line 1'
        node.doc_string = "/home/someone"
        if scope is not None:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = str(["", scope, "relu_1"])
    return model


def test_nodes_are_named_after_their_module() -> None:
    model = scoped("model.down.0", "model.down.0", None, "model.up", "", "model.down.0")
    NameNodes()(model)
    names = [node.name for node in model.graph]
    assert names == ["down.0/Relu", "down.0/Relu_1", "down.0/Relu_2", "up/Relu", "/Relu", "down.0/Relu_3"]
    assert [node.outputs[0].name for node in model.graph] == [*names[:-1], "v6"], "an output keeps its name"


def test_a_module_reached_through_its_parents_dict_has_its_plain_name() -> None:
    model = scoped("model.__dict__['_modules']['time_proj']", "__dict__['_modules']['time_proj'].act")
    NameNodes()(model)
    assert [node.name for node in model.graph] == ["time_proj/Relu", "time_proj.act/Relu"]


def test_torchs_word_for_nowhere_is_no_module() -> None:
    model = scoped("model.up", "_empty_nn_module_stack_from_metadata_hook")
    NameNodes()(model)
    assert [node.name for node in model.graph] == ["up/Relu", "up/Relu_1"]


def test_what_the_tracer_knows_of_the_machine_goes() -> None:
    model = scoped("model.up", None)
    model.metadata_props["source"] = model.graph.metadata_props["source"] = "/home/someone"
    NameNodes()(model)
    assert b"/home" not in ir.to_proto(model).SerializeToString()

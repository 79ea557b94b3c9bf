"""The gate of token merging: graphs with forced decisions, and decisions that are rejected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from latentrt.bundle.graph_ranges import check_ranges
from latentrt.bundle.graph_shapes import infer_values
from latentrt.bundle.graph_types import infer_types
from latentrt.bundle.onnx_graph import read_graph
from latentrt.errors import GateError
from latentrt_export.gates.token_merging import check_matchings, force_decisions
from latentrt_export.graphs.segments import SegmentedGraph
from latentrt_export.graphs.trace import trace
from latentrt_export.modules.module import Arrays
from latentrt_export.modules.token_merging import force_matchings
from tests.export.modules.merged import Merged, noise
from tests.export.small_graph import small_graph

CELL, ORDER = "token_matching/ArgMax", "token_matching/TopK"


@pytest.fixture(scope="module")
def model() -> ir.Model:
    return trace(Merged(), {"x": noise(2, 8, 16, 24).numpy()})


@pytest.fixture
def path(model: ir.Model, tmp_path: Path) -> Path:
    ir.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def run_torch(x: NDArray[np.float32]) -> tuple[Arrays, Arrays]:
    """Return torch's outputs for tokens, and its decisions."""
    module = Merged()
    return module.torch_outputs({"x": x}), module.matchings()


def run_forced(model: ir.Model, folder: Path, feeds: Arrays) -> Arrays:
    return SegmentedGraph(force_decisions(model)[0], folder).run(feeds)


def test_a_forced_graph_gives_torchs_outputs(model: ir.Model, path: Path) -> None:
    x = noise(2, 8, 9, 11).numpy()
    expected, forced = run_torch(x)
    graph, names = force_decisions(model)
    assert names == (CELL, ORDER)
    outputs = SegmentedGraph(graph, path.parent).run({"x": x, **forced})
    for name, array in expected.items():
        np.testing.assert_allclose(outputs[name], array, atol=1e-6)  # means of a few float32
    (result,) = check_matchings("unet", "float32", outputs, forced, {"x": x.shape})
    assert (result.output, result.metric) == ("token_matching", "absolute")
    assert result.value < 1e-5
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert len(model.graph.inputs) == 1


def test_the_runtime_can_prove_the_indices(path: Path) -> None:
    """Else it would refuse the graph: merged tokens are gathered by calculated indices."""
    read = read_graph(path.read_bytes())
    for batch, height, width in ((1, 16, 24), (3, 9, 11)):
        sizes = {"batch": batch, "height": height, "width": width}
        check_ranges(read, infer_types(read), *infer_values(read, sizes), {})


def test_equal_cosines_allow_either_decision(model: ir.Model, path: Path) -> None:
    """Of equal tokens torch chooses the first, and a graph that chooses another is not worse."""
    x = np.ones((1, 8, 8, 8), np.float32)
    expected, forced = run_torch(x)
    other = {**forced, CELL: (forced[CELL] + 1) % 16}
    outputs = run_forced(model, path.parent, {"x": x, **other})
    (result,) = check_matchings("unet", "float32", outputs, other, {})
    assert result.value < 1e-6
    np.testing.assert_allclose(outputs["long"], expected["long"], atol=1e-6)


def test_a_forced_graph_follows_the_decisions(model: ir.Model, path: Path) -> None:
    x = noise(1, 8, 8, 8).numpy()
    expected, forced = run_torch(x)
    outputs = run_forced(model, path.parent, {"x": x, **forced, CELL: (forced[CELL] + 1) % 16})
    assert np.abs(outputs["long"] - expected["long"]).max() > 0.1


@pytest.mark.parametrize("wrong", [CELL, ORDER])
def test_a_worse_decision_of_torch_is_rejected(model: ir.Model, path: Path, wrong: str) -> None:
    x = noise(1, 8, 8, 8).numpy()
    _, forced = run_torch(x)
    worse = dict(forced)
    if wrong == CELL:
        worse[CELL] = (worse[CELL] + 1) % 16
    else:
        worse[ORDER] = np.concatenate([worse[ORDER][:, 47::-1], worse[ORDER][:, 48:]], axis=1)
    outputs = run_forced(model, path.parent, {"x": x, **worse})
    with pytest.raises(GateError, match=r"token_matching scores another decision higher than torch's by \d\.\d+"):
        check_matchings("unet", "float32", outputs, worse, {"x": x.shape})


def test_a_worse_decision_of_the_graph_is_rejected(model: ir.Model, tmp_path: Path) -> None:
    """Although its forced outputs are right: on its own it would merge the least similar tokens first."""
    x = noise(1, 8, 8, 8).numpy()
    _, forced = run_torch(x)
    wrong = model.clone()
    (node,) = (node for node in wrong.graph if node.name == ORDER)
    node.attributes["largest"] = ir.AttrInt64("largest", 0)
    ir.save(wrong, tmp_path / "model.onnx")
    outputs = run_forced(wrong, tmp_path, {"x": x, **forced})
    with pytest.raises(GateError, match=r"token_matching scores another decision higher than its own by \d\.\d+"):
        check_matchings("unet", "float32", outputs, forced, {"x": x.shape})
    own = f"{ORDER}/own"
    outputs[own] = np.concatenate([forced[ORDER][:, :48], forced[ORDER][:, :47:-1]], axis=1)
    with pytest.raises(GateError, match="token_matching has other destinations than torch"):
        check_matchings("unet", "float32", outputs, forced, {"x": x.shape})


COSINES = np.array([[[0.9, 0.1], [0.2, 0.8], [1.0, 0.0], [0.0, 1.0]]], np.float32)
DECISIONS = {CELL: np.array([[0, 1, 0, 1]]), ORDER: np.array([[0, 1, 2, 3]])}
FORCED_OUTPUTS = {"token_matching/MatMul": COSINES, **{f"{name}/own": each for name, each in DECISIONS.items()}}


def spoil(array: NDArray[np.generic], value: float) -> NDArray[np.generic]:
    spoiled = array.copy()
    spoiled.flat[1] = value
    return spoiled


@pytest.mark.parametrize(
    "change",
    [
        {"token_matching/MatMul": spoil(COSINES, np.nan)},
        {"token_matching/MatMul": spoil(COSINES, -np.inf)},
        {"token_matching/MatMul": COSINES[:, :, :0]},
        {"token_matching/MatMul": COSINES[0]},
        {"token_matching/MatMul": None},
        {f"{CELL}/own": DECISIONS[CELL][:, :1]},
        {f"{CELL}/own": spoil(DECISIONS[CELL], -1)},
        {f"{CELL}/own": spoil(DECISIONS[CELL], 2)},
        {f"{ORDER}/own": spoil(DECISIONS[ORDER], 0)},
        {f"{ORDER}/own": None},
    ],
)
def test_what_cannot_be_compared_never_passes(change: dict[str, NDArray[np.generic] | None]) -> None:
    assert check_matchings("unet", "float32", FORCED_OUTPUTS, DECISIONS, {})[0].value == 0
    outputs = {name: each for name, each in {**FORCED_OUTPUTS, **change}.items() if each is not None}
    with pytest.raises(GateError, match="token_matching cannot be compared"):
        check_matchings("unet", "float32", outputs, DECISIONS, {})


def test_a_module_can_be_forced() -> None:
    module, x = Merged(), noise(1, 8, 8, 8).numpy()
    expected = module.torch_outputs({"x": x})
    forced = module.matchings()
    other = {**forced, CELL: (forced[CELL] + 1) % 16}
    with force_matchings(module, other):
        found = module.torch_outputs({"x": x})
    assert np.abs(found["long"] - expected["long"]).max() > 0.1
    np.testing.assert_array_equal(module.torch_outputs({"x": x})["long"], expected["long"])
    with force_matchings(module, forced):
        moved = module.torch_outputs({"x": x + 1e-3 * noise(1, 8, 8, 8, seed=1).numpy()})
        np.testing.assert_array_equal(module.matchings()[ORDER], forced[ORDER])
    assert np.abs(moved["long"] - expected["long"]).max() < 0.02, "as the same tokens were merged"


def test_a_graph_without_matchings_is_unchanged() -> None:
    model = small_graph("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    graph, names = force_decisions(model)
    assert names == ()
    assert graph is model

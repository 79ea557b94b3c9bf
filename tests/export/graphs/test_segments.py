"""Graphs evaluated in segments have the outputs of the whole graph."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentrt_export.graphs import segments
from latentrt_export.graphs.segments import SegmentedGraph, find_computed
from latentrt_export.modules.module import Arrays
from tests.export.small_graph import run, small_graph

# Two layers with a skip, sizes that cross borders, and a weight behind a node of its own.
TEXT = """
g (float[B,4] x, float[4,4] u, float[4,4] v, float[4,4] w) => (float[B,4] y, float[4,4] t) {
  a = MatMul(x, u)
  n = Shape(a)
  b = MatMul(a, v)
  t = Transpose(w)
  c = MatMul(b, t)
  d = Add(c, a)
  y = Reshape(d, n)
}"""


@pytest.fixture
def model() -> ir.Model:
    rng = np.random.default_rng(0)
    return small_graph(TEXT, weights={name: rng.normal(size=(4, 4)).astype(np.float32) for name in "uvw"})


def feeds(count: int) -> Arrays:
    return {"x": np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)}


@pytest.mark.parametrize(("elements", "count"), [(16, 3), (32, 2), (48, 1)])
def test_segments_give_the_whole_graphs_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: ir.Model, elements: int, count: int
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_WEIGHTS", elements)
    expected = [run(model, tmp_path, feeds(rows)) for rows in (2, 5)]
    graph = SegmentedGraph(model, tmp_path)
    assert len(graph) == count
    for found, whole in zip(graph.run_all([feeds(2), feeds(5)]), expected, strict=True):
        assert found.keys() == whole.keys() == {"y", "t"}
        for name, array in whole.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-6)  # sums of four float32


def test_a_node_of_more_weights_than_a_segment_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: ir.Model
) -> None:
    monkeypatch.setattr(segments, "SEGMENT_WEIGHTS", 1)
    np.testing.assert_allclose(
        SegmentedGraph(model, tmp_path).run(feeds(3))["y"], run(model, tmp_path, feeds(3))["y"], rtol=1e-6
    )


def test_other_feeds_are_ignored_and_no_file_is_left(tmp_path: Path, model: ir.Model) -> None:
    SegmentedGraph(model, tmp_path).run({**feeds(2), "of another graph": np.ones(3)})
    assert [*tmp_path.iterdir()] == []
    assert SegmentedGraph(model, tmp_path).run_all([]) == []


def test_the_values_of_earlier_segments_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: ir.Model
) -> None:
    """Else every activation of the network would be kept."""
    monkeypatch.setattr(segments, "SEGMENT_WEIGHTS", 16)
    kept = []

    class Counted(SegmentedGraph):
        def _run_segment(self, index: int, segment: segments._Segment, values: list[Arrays]) -> None:  # type: ignore[override]
            super()._run_segment(index, segment, values)
            kept.append({*values[0]})

    Counted(model, tmp_path).run(feeds(2))
    assert kept[0] == {"a", "n"}
    assert kept[-1] == {"y", "t"}


def test_values_of_weights_alone_are_not_computed_from_inputs(model: ir.Model) -> None:
    assert {value.name for value in find_computed(model)} == {"x", "a", "n", "b", "c", "d", "y"}

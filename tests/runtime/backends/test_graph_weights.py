"""Graphs whose weights are found elsewhere; all other external data is refused."""

from __future__ import annotations

import numpy as np
import pytest

from latentrt.backends.graph_weights import _field, detach, relocate
from latentrt.errors import BundleError
from tests.runtime import tiny_graph
from tests.runtime.tiny_graph import located, model, node, tensor

NAME = "model.safetensors"
STORED = tiny_graph.stored(2)
DATA = np.frombuffer(STORED, np.uint8)


def test_relocated_weights_have_the_other_location_and_nothing_else_changes() -> None:
    graph = tiny_graph.addition()
    moved = relocate(graph, NAME, len(STORED), "proc/self/fd/7")
    assert NAME.encode() not in moved
    assert moved.count(b"proc/self/fd/7") == 2
    assert relocate(moved, "proc/self/fd/7", len(STORED), NAME) == relocate(graph, NAME, len(STORED), NAME)


def test_detached_weights_are_inputs_over_the_same_memory_and_small_ones_are_inside() -> None:
    graph, weights = detach(tiny_graph.addition(), NAME, DATA)
    assert [*weights] == ["weight"]
    np.testing.assert_array_equal(weights["weight"], np.full(tiny_graph.SHAPE, 2, np.float32))
    assert np.shares_memory(weights["weight"], DATA)
    assert NAME.encode() not in graph
    assert b"location" not in graph
    assert np.float32(0.5).tobytes() in graph


FIRST = tensor("weight", tiny_graph.SHAPE, located(256, 4 * tiny_graph.SIZE))
IN_A_NODE = _field(5, _field(1, b"value") + _field(5, tensor("c", (1,), located(256, 4))))
IN_A_LIST = _field(5, _field(1, b"values") + _field(10, tensor("c", (1,), located(256, 4))))
IN_A_SUBGRAPH = _field(5, _field(1, b"body") + _field(6, _field(5, tensor("c", (1,), located(256, 4)))))
SPARSE = _field(15, _field(1, tensor("c", (1,), located(256, 4))))


@pytest.mark.parametrize(
    "entries",
    [
        located(256, 16384, "other.safetensors"),
        located(256, 16384, "../model.safetensors"),
        located(256, 16384, "/etc/passwd"),
        located(256, 16384, "model.safetensors\0"),
        located(256, 16384, "*/_ORT_MEM_ADDR_/*"),
        located(256, 16384, ""),
        located(10**6, 16384),
        located(len(STORED) - 16383, 16384),
        located(256, 16380),
        located(256, 0),
        {"location": NAME, "offset": "0x100", "length": "16384"},
        {"location": NAME, "offset": "-1", "length": "16384"},
        {"location": NAME, "offset": "1" * 30, "length": "16384"},
        {"location": NAME, "offset": "٣", "length": "16384"},
        {"location": NAME, "offset": "256"},
        {"location": NAME, "length": "16384"},
        {"offset": "256", "length": "16384"},
        {**located(256, 16384), "checksum": "0"},
        {},
    ],
)
def test_external_data_that_is_not_a_weight_of_the_file_is_refused(entries: dict[str, str]) -> None:
    graph = model(node("Add", ["in", "w"], "out"), _field(5, tensor("w", tiny_graph.SHAPE, entries)))
    with pytest.raises(BundleError):
        relocate(graph, NAME, len(STORED), "elsewhere")
    with pytest.raises(BundleError):
        detach(graph, NAME, DATA)


@pytest.mark.parametrize(
    "graph",
    [
        model(_field(5, FIRST), node("Constant", [], "c", IN_A_NODE)),
        model(_field(5, FIRST), node("Constant", [], "c", IN_A_LIST)),
        model(_field(5, FIRST), node("Loop", [], "c", IN_A_SUBGRAPH)),
        model(_field(5, FIRST), SPARSE),
        model(_field(5, FIRST)) + _field(25, _field(7, IN_A_NODE)),
        model(_field(5, FIRST)) + _field(20, _field(2, _field(5, FIRST))),
        model(_field(5, FIRST + tiny_graph.entry("location", NAME))),  # twice
        model(_field(5, tensor("w", tiny_graph.SHAPE, located(256, 16384), data_type=7))),
    ],
    ids=["constant", "list", "subgraph", "sparse", "function", "training", "twice", "data-type"],
)
def test_external_data_elsewhere_is_refused(graph: bytes) -> None:
    with pytest.raises(BundleError):
        relocate(graph, NAME, len(STORED), "elsewhere")
    with pytest.raises(BundleError):
        detach(graph, NAME, DATA)


def test_a_name_may_contain_the_word_location() -> None:
    graph = model(node("Add", ["in", "location"], "location.out"), _field(5, tensor("w", (1,), located(256, 4))))
    assert b"elsewhere" in relocate(graph, NAME, len(STORED), "elsewhere")


@pytest.mark.parametrize("graph", [b"\x07", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x02\x0b\x0b", b"\xff" * 12, b"\x3a"])
def test_what_is_no_protocol_buffer_is_refused(graph: bytes) -> None:
    with pytest.raises(BundleError, match="not an ONNX model"):
        relocate(graph, NAME, len(STORED), "elsewhere")


def test_two_weights_of_one_name_are_refused() -> None:
    with pytest.raises(BundleError, match="two weights"):
        detach(model(_field(5, FIRST), _field(5, FIRST)), NAME, DATA)

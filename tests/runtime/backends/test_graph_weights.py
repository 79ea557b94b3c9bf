"""Graphs whose weights are found elsewhere. What a bundle never hands out is not rewritten: `tests/attack` has more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.backends import onnxruntime, openvino
from latentrt.backends.graph_weights import detach, relocate
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import encode_manifest
from latentrt.bundle.onnx_graph import MAX_GRAPH_BYTES, ExternalData, OnnxGraph, read_graph
from latentrt.bundle.onnx_types import WEIGHT_DTYPES
from latentrt.errors import GraphError
from tests.runtime import small_bundle, tiny_graph
from tests.runtime.onnx_writer import Message, constant, encode, external, graph, model, node
from tests.runtime.tiny_graph import COMPONENT, GRAPH, INPUTS, OUTPUTS, START, WEIGHTS

NAME = Path(WEIGHTS).name
DATA = np.frombuffer(tiny_graph.stored(2), np.uint8)
IDS, HIDDEN = INPUTS[0].name, OUTPUTS[0].name


def encode_graph(*initializers: Message, nodes: list[Message]) -> bytes:
    return encode(model(graph(nodes, list(initializers), INPUTS, OUTPUTS)))


def without_weights(found: OnnxGraph) -> OnnxGraph:
    return replace(
        found, initializers={name: each for name, each in found.initializers.items() if each.external is None}
    )


def test_relocated_weights_have_the_other_location_and_nothing_else_changes() -> None:
    """A name may contain the word, and constants stay."""
    extra = [node("Gather", ["location", IDS], ["model.safetensors"], axis=0)]
    number = constant("location", 1, [300], bytes(1200))
    data = encode_graph(number, external("w", 10, [2, 3], location=NAME, offset="300", length="12"), nodes=extra)
    moved = relocate(data, "proc/self/fd/7")
    before, after = read_graph(data), read_graph(moved)
    assert after.initializers["w"].external == ExternalData("proc/self/fd/7", "300", "12")
    assert replace(after.initializers["w"], external=None) == replace(before.initializers["w"], external=None)
    assert without_weights(after) == without_weights(before)
    assert before.initializers["location"] == after.initializers["location"]
    assert relocate(moved, NAME) == relocate(data, NAME)


def test_relocated_weights_are_all_of_them() -> None:
    moved = read_graph(relocate(tiny_graph.addition(), "elsewhere"))
    assert [each.external and each.external.location for each in moved.initializers.values()] == ["elsewhere"] * 2


def test_detached_weights_are_inputs_over_the_same_memory_and_small_ones_are_inside() -> None:
    data, weights = detach(tiny_graph.addition(), DATA)
    assert [*weights] == ["weight"]
    np.testing.assert_array_equal(weights["weight"], np.full(tiny_graph.SHAPE, 2, np.float32))
    assert np.shares_memory(weights["weight"], DATA)
    before, after = read_graph(tiny_graph.addition()), read_graph(data)
    assert (after.inputs["weight"].dtype, after.inputs["weight"].shape) == (1, tiny_graph.SHAPE)
    assert after.initializers == {"bias": replace(before.initializers["bias"], raw=b"\0\0\0\x3f", external=None)}
    assert {IDS: after.inputs[IDS]} == before.inputs
    assert (after.nodes, after.outputs, after.opsets) == (before.nodes, before.outputs, before.opsets)


@pytest.mark.parametrize(("dtype", "numpy_type"), WEIGHT_DTYPES.items())
def test_weights_of_every_type(dtype: int, numpy_type: str) -> None:
    size = 5000 * np.dtype(numpy_type).itemsize
    stored = np.arange(3 + size, dtype=np.uint32).astype(np.uint8)  # at an odd place
    weight = external("w", dtype, [50, 100], location=NAME, offset="3", length=str(size))
    data, weights = detach(encode_graph(weight, nodes=[]), stored)
    assert weights["w"].dtype == numpy_type
    assert weights["w"].tobytes() == stored[3:].tobytes()
    assert read_graph(data).inputs["w"].dtype == dtype


# --- Only what a bundle has checked is rewritten ----------------------------------------------------------------------


def _foreign(kind: str) -> bytes:
    """Return the graph with a tensor of another file, at a place that the rewrites do not look at."""
    other = external("c", 1, [1], location=NAME, offset=str(START))
    weight = external("w", 1, tiny_graph.SHAPE, location=NAME, offset=str(START), length=str(4 * tiny_graph.SIZE))
    last = node("Gather", ["w", IDS], [HIDDEN], axis=0)
    attributes: dict[str, Message] = {
        "constant": [(1, "value"), (5, other), (20, 4)],
        "list": [(1, "values"), (10, other), (20, 9)],
        "subgraph": [(1, "body"), (6, [(2, "g"), (5, other)]), (20, 5)],
    }
    if kind in attributes:
        foreign = [*node("Constant" if kind != "subgraph" else "Loop", [], ["c"]), (5, attributes[kind])]
        return encode_graph(weight, nodes=[foreign, last])
    content = graph([last], [weight], INPUTS, OUTPUTS)
    if kind == "sparse":
        return encode(model([*content, (15, [(1, other)])]))
    in_model = {
        "function": (25, [(1, "f"), (7, [*node("Constant", [], ["c"]), (5, attributes["constant"])])]),
        "training": (20, [(2, [(2, "g"), (5, other)])]),
    }
    return encode([*model(content), in_model[kind]])


def _open_onnxruntime(bundle: Bundle) -> Any:
    return onnxruntime.open_session(bundle, COMPONENT)


def _open_openvino(bundle: Bundle) -> Any:
    with openvino._Graph(bundle, GRAPH, COMPONENT).opened(None, {"input_ids": (1, 77)}):
        raise AssertionError


@pytest.mark.parametrize("load", [_open_onnxruntime, _open_openvino])
@pytest.mark.parametrize("kind", ["constant", "list", "subgraph", "sparse", "function", "training"])
def test_external_data_elsewhere_is_refused_before_a_graph_is_rewritten(
    kind: str, load: Callable[[Bundle], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime would read it below the folder `/`."""
    small_bundle.write_bundle(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(DATA.tobytes())
    (tmp_path / GRAPH).write_bytes(_foreign(kind))
    (tmp_path / "bundle.json").write_bytes(encode_manifest(small_bundle.manifest(tmp_path)))

    def fail(*_: Any) -> Any:
        raise AssertionError("a graph that was not checked reached the rewriting")

    monkeypatch.setattr(onnxruntime, "relocate", fail)
    monkeypatch.setattr(openvino, "detach", fail)
    with pytest.raises(GraphError, match=GRAPH):
        load(Bundle.open(tmp_path))


@pytest.mark.parametrize(("load", "name"), [(_open_onnxruntime, "relocate"), (_open_openvino, "detach")])
def test_the_graph_that_is_rewritten_is_the_one_that_was_checked(
    load: Callable[[Bundle], Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would pass with backends that rewrite nothing."""
    bundle = tiny_graph.write_bundle(tmp_path)
    given: list[bytes] = []

    def keep(data: bytes, *_: Any) -> Any:
        given.append(data)
        raise InterruptedError

    monkeypatch.setattr({"relocate": onnxruntime, "detach": openvino}[name], name, keep)
    with pytest.raises(InterruptedError):
        load(bundle)
    assert given == [bundle.read(GRAPH, MAX_GRAPH_BYTES)]

"""The element types that are inferred are those that ONNX Runtime computes."""

from __future__ import annotations

import pytest

from latentrt.bundle.graph_types import infer_types
from latentrt.bundle.onnx_graph import GraphFormatError
from latentrt.bundle.onnx_types import CODES, ELEMENT_TYPES
from tests.runtime.bundle.test_graph_shapes import CASES, build, compute, n


@pytest.mark.parametrize("name", CASES)
def test_an_operator(name: str) -> None:
    nodes, constants = CASES[name]
    outputs = [text for number, text in nodes[-1] if number == 2]
    data, read = build(nodes, constants, outputs)
    types = infer_types(read)
    made = [ELEMENT_TYPES[types[output]].name for output in outputs]
    assert made == [array.dtype.name for array in compute(data)]


def test_a_type_that_the_exporter_never_writes() -> None:
    _, read = build([n("Cast", "x", to=16)], [], [])
    with pytest.raises(GraphFormatError, match="which makes data type 16, expected one of"):
        infer_types(read)


def test_a_node_without_the_input_that_gives_the_type() -> None:
    _, read = build([n("Where", "x")], [], [])
    with pytest.raises(GraphFormatError, match=r"with the inputs \['x'\], expected those of Where"):
        infer_types(read)
    assert CODES["float32"] == infer_types(build([n("Identity", "x")], [], [])[1])["made"]

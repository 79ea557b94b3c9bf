"""Graphs that refer to data outside their weights file are rejected; some of them in a bundle, beside that data."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.bundle.graph_check import ComponentGraph, check_graph
from latentrt.errors import GraphError
from tests.attack import external_data
from tests.attack.external_data import GRAPH
from tests.attack.judge import attack_in_test
from tests.runtime.onnx_writer import encode
from tests.runtime.small_bundle import SIGNATURES, WEIGHTS, WEIGHTS_BYTES

CASES = list(external_data.cases())
ROLE, INPUTS, OUTPUTS = SIGNATURES["unet"]
EXPECTED = ComponentGraph(
    file=GRAPH,
    weights=WEIGHTS,
    weights_bytes=WEIGHTS_BYTES,
    opset=21,
    role=ROLE,
    inputs=INPUTS,
    outputs=OUTPUTS,
    ranges={},
)


def test_there_are_enough_cases_and_none_twice() -> None:
    assert len(dict(CASES)) == len({data for _, data in CASES}) == len(CASES) >= 150


def test_the_graph_that_they_change_is_accepted(tmp_path: Path) -> None:
    valid = encode(external_data.valid())
    check_graph(valid, EXPECTED)
    with pytest.raises(AssertionError, match="returned the graph"):
        attack_in_test(external_data, valid, tmp_path)


def test_every_case_is_refused() -> None:
    for name, data in CASES:
        with pytest.raises(GraphError) as refused:
            check_graph(data, EXPECTED)
        assert str(refused.value).startswith(GRAPH), name
        assert str(refused.value).isprintable(), name


def test_a_bundle_returns_none_of_them(tmp_path: Path) -> None:
    for _, data in CASES[::7]:
        attack_in_test(external_data, data, tmp_path)

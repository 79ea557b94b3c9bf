"""The metrics of a gate: what cannot be compared is a miss of every bound."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.bundle.gate import difference, find_mismatch, message
from latentrt.bundle.manifest import GateMetric

METRICS = get_args(GateMetric)
ONES = np.ones((2, 3), np.float32)


def spoiled(value: float) -> NDArray[np.float32]:
    array = ONES.copy()
    array[1, 2] = value
    return array


CASES: dict[str, tuple[NDArray[Any], NDArray[Any] | None, str]] = {
    "nan": (ONES, spoiled(np.nan), "has values that are not finite"),
    "infinite": (ONES, spoiled(np.inf), "has values that are not finite"),
    "reference-nan": (spoiled(np.nan), ONES, "cannot be compared, torch's has values that are not finite,"),
    "both-nan": (spoiled(np.nan), spoiled(np.nan), "cannot be compared, torch's has values that are not finite,"),
    "both-infinite": (spoiled(np.inf), spoiled(np.inf), "cannot be compared, torch's has values that are not finite,"),
    "broadcast": (ONES, ONES[:1], "has the shape (1, 3), torch's (2, 3),"),
    "scalar": (ONES, np.float32(1) * np.ones((), np.float32), "has the shape (), torch's (2, 3),"),
    "dtype": (ONES, ONES.astype(np.float64), "has the dtype float64, torch's float32,"),
    "integers": (ONES.astype(np.uint8), ONES, "has the dtype float32, torch's uint8,"),
    "empty": (ONES[:0], ONES[:0], "has no values, like torch's,"),
    "missing": (ONES, None, "is missing, torch's is not,"),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_compared_is_a_miss(case: str, metric: GateMetric) -> None:
    reference, found, expected = CASES[case]
    value = difference(reference, found, metric)
    assert math.isnan(value)
    assert find_mismatch(reference, found, "torch's") == expected
    assert message(reference, found, value, metric, "torch's") == expected


@pytest.mark.parametrize("metric", METRICS)
def test_a_reference_of_zeros_is_met_by_zeros_alone(metric: GateMetric) -> None:
    zeros = np.zeros((2, 3), np.uint8 if metric == "levels" else np.float32)
    assert difference(zeros, zeros, metric) == 0
    near = zeros.copy()
    near[0, 0] = 1 if metric == "levels" else 1e-6
    value = difference(zeros, near, metric)
    assert value > (1e30 if metric in ("relative", "rms") else 0)
    assert find_mismatch(zeros, near, "torch's") is None


def test_equal_values_have_no_difference() -> None:
    assert [difference(ONES, ONES, metric) for metric in METRICS] == [0, 0, 0, 0]
    assert message(ONES, ONES * 2, 1.0, "relative", "torch's") == "is 1 (relative) from torch's"

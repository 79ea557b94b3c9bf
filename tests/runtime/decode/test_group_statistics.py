"""Mean and variance over bands, beside numpy's in float64 over everything."""

from __future__ import annotations

import numpy as np
import pytest

from latentrt.decode.group_statistics import GroupStatistics


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("rows", [1, 4, 37])
def test_bands_give_what_the_whole_gives(mean: float, rows: int) -> None:
    rng = np.random.default_rng(rows)
    # Each group has another scale and another place, and so has each row.
    values = rng.normal(mean, 1, (2, 12, 37, 19)) * np.arange(1, 13)[:, None, None] + np.arange(37)[:, None] / 10
    features = values.astype(np.float32)
    statistics = GroupStatistics(4)
    for first in range(0, 37, rows):
        statistics.add(features[:, :, first : first + rows])
    found = statistics.feeds()
    groups = features.astype(np.float64).reshape(2, 4, -1)
    # Of single precision. A sum of squares less the square of the sum would be off by a tenth where the mean is 1000
    # times the deviation.
    np.testing.assert_allclose(found["mean"], groups.mean(axis=2), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found["variance"], groups.var(axis=2), rtol=1e-5)
    assert {value.dtype.name for value in found.values()} == {"float32"}


def test_a_plain_field_has_no_variance() -> None:
    statistics = GroupStatistics(2)
    for _ in range(3):
        statistics.add(np.full((1, 4, 5, 6), 0.1, np.float32))
    found = statistics.feeds()
    assert found["mean"].tolist() == [[np.float32(0.1)] * 2]
    assert found["variance"].max() < 1e-15

"""The quantiles of a beta distribution, against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from latentrt.sampling import sigmas
from latentrt.sampling.beta_distribution import quantile


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (0.3, 0.9), (0.9, 0.2), (0.5, 0.5), (1.0, 1.0)])
def test_quantiles_are_scipys(alpha: float, beta: float) -> None:
    probability = np.concatenate([np.linspace(0, 1, 1001), 10.0 ** -np.arange(1, 20), 1 - 2.0 ** -np.arange(2, 50)])
    found = quantile(probability, alpha, beta)
    # Both in float64, by other ways. Measured: 1.1e-15.
    np.testing.assert_allclose(found, scipy.stats.beta.ppf(probability, alpha, beta), rtol=1e-13, atol=1e-14)
    assert np.all(np.diff(found[:1001]) > 0)


def test_of_half_the_probability_half_is_below() -> None:
    assert quantile(np.array([0.0, 0.5, 1.0]), 0.6, 0.6).tolist() == [0.0, pytest.approx(0.5, abs=1e-15), 1.0]


def test_a_grid_of_beta_levels_runs_from_end_to_end() -> None:
    grid = sigmas.beta(14.6, 0.03, 20)
    np.testing.assert_allclose(grid[[0, -1]], [14.6, 0.03], rtol=1e-12)
    assert np.all(np.diff(grid) < 0)
    middle = np.abs(np.diff(grid))
    assert middle[0] < middle[9] > middle[-1]  # denser at both ends

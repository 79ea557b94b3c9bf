"""Noise schedules and grids against torch, diffusers and scipy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from numpy.typing import NDArray

from latentrt.sampling import sigmas
from tests.parity.sampling import diffusers_oracle as oracle

SCHEDULES = [("linear", 0.0001, 0.02), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 0.0001, 0.02)]
T = 1000


def theirs(schedule: str, start: float, end: float, *, exact: bool, **config: Any) -> Any:
    config |= {"beta_schedule": schedule, "beta_start": start, "beta_end": end}
    return oracle.scheduler("EulerDiscreteScheduler", config, T, exact=exact)


def units(ours: NDArray[np.float32], expected: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Return differences in units of the last place."""
    return np.abs(ours - expected) / np.spacing(ours)


def ulps(ours: NDArray[np.float32], expected: NDArray[np.floating[Any]]) -> float:
    return float(units(ours, expected).max())


@pytest.mark.parametrize("count", [1, 2, 3, 16, 77, 999, 1000])
@pytest.mark.parametrize(("start", "end"), [(0.0001, 0.02), (0.00085**0.5, 0.012**0.5), (3.5, -2.6)])
def test_linspace_equals_torch_to_the_bit(start: float, end: float, count: int) -> None:
    expected = torch.linspace(start, end, count, dtype=torch.float32).numpy()
    np.testing.assert_array_equal(sigmas.linspace_float32(start, end, count), expected)


@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_betas_and_their_products_equal_diffusers_to_the_bit(
    schedule: sigmas.BetaSchedule, start: float, end: float
) -> None:
    expected = theirs(schedule, start, end, exact=False)
    betas = sigmas.training_betas(schedule, start, end, T)
    np.testing.assert_array_equal(betas, expected.betas.numpy())
    np.testing.assert_array_equal(sigmas.alphas_cumprod(betas), expected.alphas_cumprod.numpy())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_sigmas_equal_diffusers(schedule: sigmas.BetaSchedule, start: float, end: float, exact: bool) -> None:
    expected = theirs(schedule, start, end, exact=exact).sigmas.numpy()[-2::-1]
    ours = sigmas.training_sigmas(sigmas.alphas_cumprod(sigmas.training_betas(schedule, start, end, T)))
    # torch's square root (MKL's) rounds wrongly for 6 values in 1,000, by one unit; numpy's does not.
    assert ulps(ours, expected) <= (0 if exact else 1)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_zero_snr_equals_diffusers(schedule: sigmas.BetaSchedule, start: float, end: float, exact: bool) -> None:
    """To the bit, with correctly rounded square roots."""
    expected = theirs(schedule, start, end, exact=exact, rescale_betas_zero_snr=True)
    alpha_bar = sigmas.alphas_cumprod(sigmas.rescale_zero_snr(sigmas.training_betas(schedule, start, end, T)))
    assert alpha_bar[-1] == 0
    off = units(alpha_bar[:-1], expected.alphas_cumprod.numpy()[:-1])
    sigmas_off = units(sigmas.training_sigmas(alpha_bar), expected.sigmas.numpy()[-2::-1])
    if exact:
        assert off.max() == sigmas_off.max() == 0
        return
    # torch's roots are off by a unit for 6 to 218 values in 1,000, depending on MKL's kernel for the CPU. The error is
    # squared and propagated by the product, and grows where the last root is subtracted from one nearly as small; that
    # of sigma grows where alpha_bar is nearly 1. Measured before that: 4 units on an Intel CPU, 11 on an AMD one.
    roots = np.sqrt(sigmas.alphas_cumprod(sigmas.training_betas(schedule, start, end, T)).astype(np.float64))
    bound = 16 * roots[:-1] / (roots[:-1] - roots[-1])
    assert np.all(off <= bound)
    assert np.all(sigmas_off[:-1] <= bound / (1 - alpha_bar[:-1]))
    assert sigmas_off[-1] <= 1  # of the sigma that is set explicitly


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.6), (0.3, 0.9), (0.9, 0.2), (0.5, 0.5), (1.0, 1.0)])
def test_beta_quantiles_equal_scipy(alpha: float, beta: float) -> None:
    probability = np.concatenate([np.linspace(0, 1, 1001), 10.0 ** -np.arange(1, 20), 1 - 2.0 ** -np.arange(2, 50)])
    found = sigmas.beta_quantile(probability, alpha, beta)
    # Both in float64, by different algorithms. Measured: 1.1e-15.
    np.testing.assert_allclose(found, scipy.stats.beta.ppf(probability, alpha, beta), rtol=1e-13, atol=1e-14)
    assert np.all(np.diff(found[:1001]) > 0)

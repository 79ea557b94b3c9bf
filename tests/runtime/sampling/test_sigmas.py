"""Training noise schedules and grids, against torch and diffusers."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import sigmas
from tests.runtime.sampling import diffusers_oracle as oracle

SCHEDULES = [("linear", 0.0001, 0.02), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 0.0001, 0.02)]
T = 1000


def theirs(schedule: str, start: float, end: float, *, exact: bool, **config: Any) -> Any:
    config |= {"beta_schedule": schedule, "beta_start": start, "beta_end": end}
    return oracle.scheduler("EulerDiscreteScheduler", config, T, exact=exact)


def units(ours: NDArray[np.float32], expected: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """Of each value's last place."""
    return np.abs(ours - expected) / np.spacing(ours)


def ulps(ours: NDArray[np.float32], expected: NDArray[np.floating[Any]]) -> float:
    return float(units(ours, expected).max())


@pytest.mark.parametrize("count", [1, 2, 3, 16, 77, 999, 1000])
@pytest.mark.parametrize(("start", "end"), [(0.0001, 0.02), (0.00085**0.5, 0.012**0.5), (3.5, -2.6)])
def test_linspace_is_torchs_to_the_bit(start: float, end: float, count: int) -> None:
    expected = torch.linspace(start, end, count, dtype=torch.float32).numpy()
    np.testing.assert_array_equal(sigmas.linspace_float32(start, end, count), expected)


@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_betas_and_their_products_are_diffusers_to_the_bit(
    schedule: sigmas.BetaSchedule, start: float, end: float
) -> None:
    expected = theirs(schedule, start, end, exact=False)
    betas = sigmas.betas(schedule, start, end, T)
    np.testing.assert_array_equal(betas, expected.betas.numpy())
    np.testing.assert_array_equal(sigmas.alphas_cumprod(betas), expected.alphas_cumprod.numpy())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_sigmas_are_diffusers(schedule: sigmas.BetaSchedule, start: float, end: float, exact: bool) -> None:
    expected = theirs(schedule, start, end, exact=exact).sigmas.numpy()[-2::-1]
    levels = sigmas.sigmas(sigmas.alphas_cumprod(sigmas.betas(schedule, start, end, T)))
    # torch's square root (MKL's) rounds wrongly for 6 values in 1,000, by one unit; numpy's does not.
    assert ulps(levels, expected) <= (0 if exact else 1)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("schedule", "start", "end"), SCHEDULES)
def test_zero_snr_is_diffusers(schedule: sigmas.BetaSchedule, start: float, end: float, exact: bool) -> None:
    """To the bit, given right square roots."""
    expected = theirs(schedule, start, end, exact=exact, rescale_betas_zero_snr=True)
    alpha_bar = sigmas.alphas_cumprod(sigmas.rescale_zero_snr(sigmas.betas(schedule, start, end, T)))
    assert alpha_bar[-1] == 0
    off = units(alpha_bar[:-1], expected.alphas_cumprod.numpy()[:-1])
    levels_off = units(sigmas.sigmas(alpha_bar), expected.sigmas.numpy()[-2::-1])
    if exact:
        assert off.max() == levels_off.max() == 0
        return
    # torch's roots are wrong by a unit for 6 to 218 values in 1,000, by what its MKL has for the CPU. That is squared
    # and carried on by the product, and grows where the last root is taken off one that is nearly as small; a level
    # grows where alpha_bar is nearly 1. Measured before that growth: 4 units on an Intel CPU, 11 on an AMD one.
    roots = np.sqrt(sigmas.alphas_cumprod(sigmas.betas(schedule, start, end, T)).astype(np.float64))
    bound = 16 * roots[:-1] / (roots[:-1] - roots[-1])
    assert np.all(off <= bound)
    assert np.all(levels_off[:-1] <= bound / (1 - alpha_bar[:-1]))
    assert levels_off[-1] <= 1  # of the level that is set by hand


def test_grids_descend_within_training() -> None:
    for spacing in get_args(sigmas.Spacing):
        for count in (1, 2, 7, 61, 500, 1000):
            grid = sigmas.visited(sigmas.timesteps(spacing, count, T, 0))
            assert len(grid) == count
            assert np.all(np.diff(grid) < 0)
            assert grid[0] <= T - 1
            assert grid[-1] >= 0


def test_karras_runs_from_end_to_end() -> None:
    grid = sigmas.karras(14.6, 0.03, 20)
    np.testing.assert_allclose(grid[[0, -1]], [14.6, 0.03], rtol=1e-12)  # float64: (σ^(1/7))^7
    assert np.all(np.diff(grid) < 0)


def test_the_timestep_of_a_training_sigma_is_its_own() -> None:
    training = sigmas.sigmas(sigmas.alphas_cumprod(sigmas.betas("scaled_linear", 0.00085, 0.012, T)))
    # Neighbouring log sigmas are 1e-3 apart and float32 to 1e-7.
    np.testing.assert_allclose(
        sigmas.timesteps_of_sigmas(training.astype(np.float64), training), np.arange(T), atol=1e-3
    )
    np.testing.assert_array_equal(sigmas.timesteps_of_sigmas(np.array([1e9, 0.0]), training), [T - 1, 0])


@pytest.mark.parametrize("betas", [[0.0, 0.5], [0.5, 1.5], [0.5, float("nan")], [-0.1, 0.5]], ids=str)
def test_betas_that_are_no_noise_schedule_are_refused(betas: list[float]) -> None:
    with pytest.raises(RequestError, match="expected betas between 0 and 1"):
        sigmas.alphas_cumprod(betas)

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from latentrt.errors import RequestError
from latentrt.sampling import sigmas

T = 1000


def test_grids_descend_within_training() -> None:
    for spacing in get_args(sigmas.TimestepSpacing):
        for count in (1, 2, 7, 61, 500, 1000):
            grid = sigmas.drop_negative(sigmas.space_timesteps(spacing, count, T, 0))
            assert len(grid) == count
            assert np.all(np.diff(grid) < 0)
            assert grid[0] <= T - 1
            assert grid[-1] >= 0


def test_karras_runs_from_end_to_end() -> None:
    grid = sigmas.karras_sigmas(14.6, 0.03, 20)
    np.testing.assert_allclose(grid[[0, -1]], [14.6, 0.03], rtol=1e-12)  # float64: (σ^(1/7))^7
    assert np.all(np.diff(grid) < 0)


def test_the_timestep_of_a_training_sigma_is_its_own() -> None:
    training = sigmas.training_sigmas(sigmas.alphas_cumprod(sigmas.training_betas("scaled_linear", 0.00085, 0.012, T)))
    # Neighbouring log sigmas are 1e-3 apart and float32 to 1e-7.
    np.testing.assert_allclose(
        sigmas.sigmas_to_timesteps(training.astype(np.float64), training), np.arange(T), atol=1e-3
    )
    np.testing.assert_array_equal(sigmas.sigmas_to_timesteps(np.array([1e9, 0.0]), training), [T - 1, 0])


@pytest.mark.parametrize("betas", [[0.0, 0.5], [0.5, 1.5], [0.5, float("nan")], [-0.1, 0.5]], ids=str)
def test_betas_outside_0_to_1_are_rejected(betas: list[float]) -> None:
    with pytest.raises(RequestError, match="betas outside 0 … 1"):
        sigmas.alphas_cumprod(betas)


def test_betas_grow_between_their_ends() -> None:
    for schedule in ("linear", "scaled_linear", "sigmoid"):
        betas = sigmas.training_betas(schedule, 0.001, 0.02, T)
        assert betas.dtype == np.float32
        assert np.all(np.diff(betas) >= 0)
        # The sigmoid starts at 0.25 % of the range.
        np.testing.assert_allclose(betas[[0, -1]], [0.001, 0.02], rtol=0.05)


def test_zero_snr_leaves_the_first_timestep_and_no_signal_at_the_last() -> None:
    betas = sigmas.training_betas("scaled_linear", 0.00085, 0.012, T)
    alpha_bar = sigmas.alphas_cumprod(sigmas.rescale_zero_snr(betas))
    assert alpha_bar[0] == pytest.approx(sigmas.alphas_cumprod(betas)[0], rel=1e-6)  # float32
    assert alpha_bar[-1] == 0
    assert sigmas.training_sigmas(alpha_bar)[-1] == pytest.approx(2**12, rel=1e-6)


def test_the_median_of_a_symmetric_beta_distribution_is_its_middle() -> None:
    quantiles = sigmas.beta_quantile(np.array([0.0, 0.5, 1.0]), 0.6, 0.6)
    np.testing.assert_allclose(quantiles, [0, 0.5, 1], atol=1e-15)


@pytest.mark.parametrize("alpha", [0.3, 0.6, 1.0])
def test_beta_quantiles_have_known_values(alpha: float) -> None:
    """With β = 1 the distribution is x^α."""
    probability = np.linspace(0, 1, 101)
    np.testing.assert_allclose(sigmas.beta_quantile(probability, alpha, 1.0), probability ** (1 / alpha), atol=1e-14)


def test_beta_sigmas_are_dense_at_both_ends() -> None:
    grid = sigmas.beta_sigmas(14.6, 0.03, 20)
    np.testing.assert_allclose(grid[[0, -1]], [14.6, 0.03], rtol=1e-12)
    assert np.all(np.diff(grid) < 0)
    gaps = np.abs(np.diff(grid))
    assert gaps[0] < gaps[9] > gaps[-1]


def test_flow_sigmas_are_shifted_towards_noise_and_stretched() -> None:
    grid = np.linspace(1, 0.1, 10)
    np.testing.assert_allclose(sigmas.shift_sigmas(grid, 3.0), 3 * grid / (1 + 2 * grid), rtol=1e-15)
    np.testing.assert_allclose(
        sigmas.shift_sigmas_dynamically(grid, np.log(3.0), "exponential"), sigmas.shift_sigmas(grid, 3.0), rtol=1e-12
    )
    stretched = sigmas.stretch_sigmas_to_terminal(grid, 0.3)
    np.testing.assert_allclose(stretched[[0, -1]], [1, 0.3], rtol=1e-12)

"""Every sampler's table against the diffusers scheduler of the same configuration.

To add a sampler, add its options to `OPTIONS`: those that change its numbers, with the values to be crossed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt import samplers
from latentrt.errors import RequestError
from latentrt.noise import Generator
from latentrt.schedule import Latents, Recurrence, Schedule
from latentrt.schedule import denoise as run
from tests.runtime import diffusers_oracle as oracle

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}

# scheduler_config.json of Stable Diffusion 1.5 as it stands on disk.
ON_DISK = STABLE_DIFFUSION | {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}

COMMON: dict[str, list[Any]] = {
    "betas": [{}, STABLE_DIFFUSION, {"beta_schedule": "squaredcos_cap_v2"}],
    "timestep_spacing": ["leading", "linspace", "trailing"],
    "steps_offset": [0, 1],
}
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "ddim": {
        "prediction_type": ["epsilon", "v_prediction", "sample"],
        "set_alpha_to_one": [True, False],
        "rescale_betas_zero_snr": [False, True],
        "clip_sample": [False],
        "eta": [0.0, 0.5, 1.0],
    },
    "pndm": {
        "prediction_type": ["epsilon", "v_prediction"],
        "set_alpha_to_one": [True, False],
        "skip_prk_steps": [True, False],
    },
    "euler": {
        "prediction_type": ["epsilon", "v_prediction", "sample", "original_sample"],
        "rescale_betas_zero_snr": [False, True],
        "final_sigmas_type": ["zero", "sigma_min"],
        "interpolation_type": ["linear", "log_linear"],
        "use_karras_sigmas": [False, True],
        "sigma_min": [None, 0.1],
        "sigma_max": [None, 10.0],
    },
    "euler_a": {"prediction_type": ["epsilon", "v_prediction"], "rescale_betas_zero_snr": [False, True]},
    "dpmpp_2m": {
        "prediction_type": ["epsilon", "v_prediction", "sample"],
        "rescale_betas_zero_snr": [False, True],
        "final_sigmas_type": ["zero", "sigma_min"],
        "use_karras_sigmas": [False, True],
        "solver_type": ["midpoint", "heun", "bh2"],
        "solver_order": [2, 1],
        "euler_at_final": [False, True],
        "lower_order_final": [True, False],
        "lambda_min_clipped": [-float("inf"), -2.0],
    },
}

# What `cases` may rightly be refused for; each refusal has its own test below.
REFUSALS = (
    "says nothing of the picture",
    "warm-up of PNDM",
    "steps, but",
    "found a step at timestep",
    "noise levels that rise",
    "two steps at the same noise level",
)

# Against the row's largest coefficient. With the exact oracle what is left is our own float32, a coefficient cast once.
# Measured: 7e-7 accumulated over 50 rows, 3e-6 in one row of 999.
TOLERANCE = 1e-5

# Against diffusers as it is, with its own float32. In a table of hundreds of rows σ differs by a thousandth from row to
# row, so a wrong last place of torch's square roots counts for much: measured 3.2e-5.
LONG_AS_IT_IS = 1e-4
# Where diffusers subtracts nearly equal float32 numbers (see `cancels`). Measured over the large grid: 7.7e-4.
CANCELLED = 1e-3


def cases(name: str, count: int) -> Iterator[tuple[dict[str, Any], float]]:
    """`count` of the combinations of options, always the same ones: a configuration and an eta."""
    crossed = COMMON | OPTIONS[name]
    total = list(itertools.product(*crossed.values()))
    for values in random.Random(0).sample(total, min(count, len(total))):
        config = dict(zip(crossed, values, strict=True))
        eta = config.pop("eta", 0.0)
        yield config.pop("betas") | config, eta


def cancels(name: str, config: dict[str, Any], eta: float) -> bool:
    """Whether diffusers, as it is, loses more than the tolerance in a table of up to 100 rows.

    DDIM with eta 1 is left with little of 1 − ᾱ' − σ². PNDM, given v, takes x out of √(ᾱ'/ᾱ)·x again, which is large
    where the signal is weak; Stable Diffusion's betas do not go so far. With epsilon other terms outweigh the loss.
    """
    epsilon = config.get("prediction_type", "epsilon") == "epsilon"
    if name == "ddim":
        return eta == 1 and not epsilon
    return name == "pndm" and not epsilon and config.get("beta_schedule") != "scaled_linear"


def assert_equals_diffusers(
    name: str, config: dict[str, Any], steps: int, eta: float, *, exact: bool = True, afresh: bool = False
) -> None:
    try:
        schedule = samplers.schedule(name, config, steps, eta=eta)
    except RequestError as refusal:
        if not any(reason in str(refusal) for reason in REFUSALS):
            raise
        return
    made = oracle.scheduler(samplers.find(name).class_name, config, steps, exact=exact)
    if made.timesteps[-1] < 0:
        return  # see test_trailing_spacing_stops_before_timestep_minus_one
    assert_same_grid(schedule, made, exact=exact)
    tolerance = TOLERANCE
    if not exact:
        tolerance = CANCELLED if cancels(name, config, eta) else LONG_AS_IT_IS if steps > 100 else TOLERANCE
    for i, (found, expected) in enumerate(oracle.beside(schedule, made, eta, afresh=afresh)):
        if np.all(np.isfinite(expected)):  # the exceptions have tests in test_sampler_exceptions.py
            error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
            assert error <= tolerance, f"row {i // 2} of {config}, {steps} steps, eta {eta}: {error}"


def assert_same_grid(schedule: Schedule, made: Any, *, exact: bool) -> None:
    # As it is, a Karras grid's timesteps are interpolated between σ that are a unit in the last place off here and
    # there. Measured: 6e-5.
    tolerance = 3e-4 if made.config.get("use_karras_sigmas") and not exact else 0
    np.testing.assert_allclose(schedule.t, made.timesteps.numpy(), rtol=0, atol=tolerance)
    # Float32 rounding, at zero SNR of values that went through a dozen of them.
    assert schedule.init_noise_sigma == pytest.approx(float(made.init_noise_sigma), rel=1e-6)
    if exact:
        with np.errstate(divide="ignore"):  # zero SNR
            levels = schedule.sigma / schedule.alpha
        np.testing.assert_allclose(levels, oracle.levels(made), rtol=1e-13)  # float64: no float32 rounding is missing


# Each with the exact oracle, and with diffusers as it is.
both = pytest.mark.parametrize("exact", [True, False], ids=["exact", "as it is"])


@both
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 25, 50])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_table_equals_diffusers(name: str, steps: int, exact: bool) -> None:
    for config, eta in cases(name, 40):
        assert_equals_diffusers(name, config, steps, eta, exact=exact)


@both
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_long_table_equals_diffusers_row_by_row(name: str, exact: bool) -> None:
    for config, eta in cases(name, 2):
        assert_equals_diffusers(name, config, 999, eta, exact=exact, afresh=True)


@both
@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 20, 25])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_table_equals_diffusers_on_the_large_grid(name: str, steps: int, exact: bool) -> None:
    for config, eta in cases(name, 400):
        assert_equals_diffusers(name, config, steps, eta, exact=exact)


@both
@pytest.mark.slow
@pytest.mark.parametrize("steps", [50, 100, 333, 500, 998, 999, 1000])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_long_tables_equal_diffusers_row_by_row(name: str, steps: int, exact: bool) -> None:
    for config, eta in cases(name, 12):
        assert_equals_diffusers(name, config, steps, eta, exact=exact, afresh=True)


def test_every_sampler_is_compared() -> None:
    assert OPTIONS.keys() == samplers.SAMPLERS.keys()


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_stable_diffusion_equals_diffusers_as_it_is(name: str) -> None:
    """With its own rounding, and the configuration as it stands on disk for another scheduler."""
    for prediction_type in ("epsilon", "v_prediction"):
        config = ON_DISK | {"prediction_type": prediction_type}
        made = oracle.scheduler(samplers.find(name).class_name, config, 25, exact=False)
        schedule = samplers.schedule(name, config, 25)
        assert_same_grid(schedule, made, exact=False)
        for found, expected in oracle.beside(schedule, made):
            assert np.max(np.abs(found - expected)) <= TOLERANCE * np.max(np.abs(expected))


CLIPPED = {"clip_sample": True, "clip_sample_range": 0.8}


@pytest.mark.parametrize("more", [{}, CLIPPED, CLIPPED | {"prediction_type": "v_prediction"}], ids=str)
@pytest.mark.parametrize(("name", "eta"), [*((name, 0.0) for name in samplers.SAMPLERS), ("ddim", 0.7)])
def test_latents_equal_diffusers_on_a_nonlinear_model(name: str, more: dict[str, Any], eta: float) -> None:
    """Real noise, a model that is not linear, and x0 clipped where there is such an option (which basis vectors cannot
    show)."""
    config, shape = ON_DISK | more, (2, 4, 5, 7)
    made = oracle.scheduler(samplers.find(name).class_name, config, 12, exact=False)
    schedule = samplers.schedule(name, config, 12, eta=eta)
    ours_noise, their_noise = Generator(3), Generator(3)
    latents = ours_noise.normal(shape) * np.float32(schedule.init_noise_sigma)
    start = their_noise.normal(shape) * np.float32(schedule.init_noise_sigma)

    def model(shown: Latents) -> Latents:
        return (np.tanh(shown[:, ::-1]) + shown / 2).astype(np.float32)

    ours = run(schedule, latents, lambda _, shown: model(shown), lambda: ours_noise.normal(shape))
    theirs = oracle.run(made, start, lambda _, shown: model(shown), lambda: their_noise.normal(shape), eta)
    for found, (_, expected) in zip(ours, theirs, strict=True):
        # Float32 rounding of both sides over 12 steps. Measured: 2e-6.
        assert np.max(np.abs(found - expected)) <= 1e-5 * np.max(np.abs(expected))


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(1, 60), spacing=st.sampled_from(["leading", "linspace"]), value=st.floats(-2, 2))
@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m"])
def test_a_model_that_knows_the_picture_ends_at_it(name: str, steps: int, spacing: str, value: float) -> None:
    config = STABLE_DIFFUSION | {"timestep_spacing": spacing, "clip_sample": False}
    schedule = samplers.schedule(name, config, steps)
    recurrence, shape = Recurrence(schedule), (1, 1, 2, 2)
    x = Generator(0).normal(shape) * np.float32(schedule.init_noise_sigma)
    for k in range(steps):
        epsilon = (x - np.float32(schedule.alpha[k] * value)) / np.float32(schedule.sigma[k])
        x = recurrence.step(k, x, epsilon)
    # Float32, where x0 is read off a latent of 15 times its size.
    np.testing.assert_allclose(x, value, atol=1e-4)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_clean_latent_is_noised_as_diffusers_does(name: str) -> None:
    made = oracle.scheduler(samplers.find(name).class_name, ON_DISK, 10, exact=False)
    schedule = samplers.schedule(name, ON_DISK, 10)
    clean, noise = np.float32(0.6), np.float32(-1.3)
    for k, t in enumerate(made.timesteps):
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(k)
        expected = made.add_noise(torch.tensor([clean]), torch.tensor([noise]), t[None]).item()
        found = schedule.alpha[k] * clean + schedule.sigma[k] * noise
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)  # float32 rounding


def test_trained_betas_are_used() -> None:
    betas = [0.01 + 0.0001 * i for i in range(100)]
    for name in samplers.SAMPLERS:
        assert_equals_diffusers(
            name, {"trained_betas": betas, "num_train_timesteps": 100, "clip_sample": False}, 10, 0.0
        )

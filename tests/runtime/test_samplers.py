"""Every sampler's table against the diffusers scheduler of the same configuration.

To add a sampler, add its options to `OPTIONS`: those that change its numbers, with the values to be crossed.
"""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt import samplers
from latentrt.errors import RequestError
from latentrt.noise import Generator
from latentrt.samplers.options import Sampler
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
REFUSALS = ("epsilon says nothing", "warm-up of PNDM", "steps, but", "noise levels that rise")

# Against the row's largest coefficient: float32 rounding of both sides, and torch's square roots (see test_sigmas), both of
# which add up over the rows. Measured: 5e-6 at 50 steps.
TOLERANCE = 1e-5
# In a long table one row alone does it: σ differs by a thousandth from row to row, so a unit in its last place counts
# for much. Measured: 2e-6 at 100 steps, 7e-5 at 999. (In float64, and given torch's square roots, all rows agree to
# 1e-14.)
LONG_TOLERANCE = 1e-4


def cases(name: str, count: int) -> Iterator[tuple[dict[str, Any], float]]:
    """`count` of the combinations of options, always the same ones: a configuration and an eta."""
    crossed = COMMON | OPTIONS[name]
    total = list(itertools.product(*crossed.values()))
    for values in random.Random(0).sample(total, min(count, len(total))):
        config = dict(zip(crossed, values, strict=True))
        eta = config.pop("eta", 0.0)
        yield config.pop("betas") | config, eta


def assert_equals_diffusers(name: str, config: dict[str, Any], steps: int, eta: float, *, afresh: bool = False) -> None:
    try:
        schedule = samplers.schedule(name, config, steps, eta=eta)
    except RequestError as refusal:
        if not any(reason in str(refusal) for reason in REFUSALS):
            raise
        return
    # In their own float32 DDIM and PNDM lose up to 8e-4 where the signal is weakest (squared cosine, zero SNR, eta 1).
    made = oracle.scheduler(samplers.find(name).class_name, config, steps, widened=name in ("ddim", "pndm"))
    assert_same_grid(schedule, made, exact=not config.get("use_karras_sigmas"))
    for i, (found, expected) in enumerate(oracle.beside(schedule, made, eta, afresh=afresh)):
        if np.all(np.isfinite(expected)):  # the exceptions have tests below
            error = np.max(np.abs(found - expected)) / np.max(np.abs(expected))
            assert error <= (LONG_TOLERANCE if afresh else TOLERANCE), (
                f"row {i // 2} of {config}, {steps} steps, eta {eta}: {error}"
            )


def assert_same_grid(schedule: Schedule, made: Any, *, exact: bool) -> None:
    # Karras' timesteps are found by interpolating in σ, and torch's σ are one unit in the last place off here and
    # there.
    tolerance = 0 if exact else 3e-4
    theirs = made.timesteps.numpy()
    np.testing.assert_allclose(schedule.t, theirs[theirs >= 0], rtol=0, atol=tolerance)
    # Float32 rounding, at zero SNR of values that went through a dozen of them.
    assert schedule.init_noise_sigma == pytest.approx(float(made.init_noise_sigma), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 25, 50])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_table_equals_diffusers(name: str, steps: int) -> None:
    for config, eta in cases(name, 40):
        assert_equals_diffusers(name, config, steps, eta)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_long_table_equals_diffusers_row_by_row(name: str) -> None:
    for config, eta in cases(name, 2):
        assert_equals_diffusers(name, config, 999, eta, afresh=True)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 20, 25, 50])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_table_equals_diffusers_on_the_large_grid(name: str, steps: int) -> None:
    for config, eta in cases(name, 1500):
        assert_equals_diffusers(name, config, steps, eta)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [100, 333, 500, 998, 999, 1000])
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_long_tables_equal_diffusers_row_by_row(name: str, steps: int) -> None:
    for config, eta in cases(name, 12):
        assert_equals_diffusers(name, config, steps, eta, afresh=True)


def test_every_sampler_is_compared() -> None:
    assert OPTIONS.keys() == samplers.SAMPLERS.keys()


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_stable_diffusion_equals_diffusers_as_it_is(name: str) -> None:
    """With nothing widened, and the configuration as it stands on disk for another scheduler."""
    for prediction_type in ("epsilon", "v_prediction"):
        config = ON_DISK | {"prediction_type": prediction_type}
        made = oracle.scheduler(samplers.find(name).class_name, config, 25)
        schedule = samplers.schedule(name, config, 25)
        assert_same_grid(schedule, made, exact=True)
        for found, expected in oracle.beside(schedule, made):
            assert np.max(np.abs(found - expected)) <= TOLERANCE * np.max(np.abs(expected))


CLIPPED = {"clip_sample": True, "clip_sample_range": 0.8}


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("more", [{}, CLIPPED, CLIPPED | {"prediction_type": "v_prediction"}], ids=str)
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_latents_equal_diffusers_on_a_nonlinear_model(name: str, more: dict[str, Any], eta: float) -> None:
    """Real noise, a model that is not linear, and x0 clipped where there is such an option (which basis vectors cannot
    show)."""
    config, shape = ON_DISK | more, (2, 4, 5, 7)
    made = oracle.scheduler(samplers.find(name).class_name, config, 12)
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
    made = oracle.scheduler(samplers.find(name).class_name, ON_DISK, 10)
    schedule = samplers.schedule(name, ON_DISK, 10)
    clean, noise = np.float32(0.6), np.float32(-1.3)
    for k, t in enumerate(made.timesteps):
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(k)
        expected = made.add_noise(torch.tensor([clean]), torch.tensor([noise]), t[None]).item()
        found = schedule.alpha[k] * clean + schedule.sigma[k] * noise
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)  # float32 rounding


# Where diffusers goes wrong and this does not.


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_trailing_spacing_stops_before_timestep_minus_one(name: str) -> None:
    config = ON_DISK | {"timestep_spacing": "trailing"}
    made = oracle.scheduler(samplers.find(name).class_name, config, 61)
    schedule = samplers.schedule(name, config, 61)
    assert made.timesteps[-1] == -1
    np.testing.assert_array_equal(schedule.t, made.timesteps[:-1].numpy())


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_deis_is_read_as_dpm_solver(final_sigmas_type: str) -> None:
    """diffusers reads it so too, but first refuses it with its own default of final_sigmas_type, `zero`."""
    config = ON_DISK | {"final_sigmas_type": final_sigmas_type}
    expected = oracle.scheduler("DPMSolverMultistepScheduler", config, 10)
    schedule = samplers.schedule("dpmpp_2m", config | {"algorithm_type": "deis"}, 10)
    for found, theirs in oracle.beside(schedule, expected):
        assert np.max(np.abs(found - theirs)) <= TOLERANCE * np.max(np.abs(theirs))


def test_heun_stays_where_the_noise_level_does() -> None:
    """Karras' last level is final_sigmas_type's sigma_min: h = 0, and diffusers divides 0 by 0."""
    config = STABLE_DIFFUSION | {"solver_type": "heun", "final_sigmas_type": "sigma_min", "lower_order_final": False}
    schedule = samplers.schedule("dpmpp_2m", config, 20, karras=True)
    assert schedule.a[-1] == pytest.approx(1, abs=1e-6)  # the levels are float32
    np.testing.assert_allclose(schedule.b[-1], 0, atol=1e-6)


def test_ancestral_steps_from_very_high_noise_are_numbers() -> None:
    """σ falls from 20,291 to 0.9: in float32 diffusers takes the square root of a negative rounding error."""
    schedule = samplers.schedule("euler_a", {"beta_schedule": "squaredcos_cap_v2"}, 3)
    assert np.all(np.isfinite(schedule.a))


# How a configuration is read.

# Parameters of the diffusers classes that change nothing here: they belong to options that are refused.
IDLE = {"dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"}


@pytest.mark.parametrize("sampler", samplers.SAMPLERS.values(), ids=lambda sampler: sampler.class_name)
def test_options_are_the_class_s_with_its_defaults(sampler: type[Sampler]) -> None:
    parameters = inspect.signature(getattr(diffusers, sampler.class_name)).parameters
    expected = {key: parameter.default for key, parameter in parameters.items() if key not in IDLE}
    assert {field.name: field.default for field in fields(sampler)} == expected


def test_keys_of_other_schedulers_are_ignored() -> None:
    stray = {"shift": 3.0, "skip_prk_steps": "no such option here", "_diffusers_version": "0.6.0"}
    assert samplers.find("euler").read(ON_DISK | stray) == samplers.find("euler").read(ON_DISK)


def test_keys_that_were_left_to_the_default_are_the_default() -> None:
    """As diffusers has it: a class that took a default does not hand it on to another class."""
    config = {"timestep_spacing": "leading", "_use_default_values": ["timestep_spacing"]}
    assert samplers.find("euler").read(config) == samplers.find("euler").read({})


def test_trained_betas_are_used() -> None:
    betas = [0.01 + 0.0001 * i for i in range(100)]
    for name in samplers.SAMPLERS:
        assert_equals_diffusers(
            name, {"trained_betas": betas, "num_train_timesteps": 100, "clip_sample": False}, 10, 0.0
        )


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m"])
def test_karras_overrides_the_configuration_both_ways(name: str) -> None:
    plain, karras = ON_DISK | {"use_karras_sigmas": False}, ON_DISK | {"use_karras_sigmas": True}
    levels = {
        key: samplers.schedule(name, config, 8, karras=override).sigma.tolist()
        for key, config, override in [
            ("plain", plain, None),
            ("karras", karras, None),
            ("on", plain, True),
            ("off", karras, False),
        ]
    }
    assert levels["on"] == levels["karras"] != levels["plain"] == levels["off"]


def test_karras_false_asks_nothing_of_a_sampler_without_it() -> None:
    assert len(samplers.schedule("ddim", ON_DISK, 8, karras=False)) == 8


@pytest.mark.parametrize("name", set(samplers.SAMPLERS) - {"ddim"})
def test_eta_acts_on_ddim_alone(name: str) -> None:
    with_eta, without = (samplers.schedule(name, ON_DISK, 5, eta=eta) for eta in (1.0, 0.0))
    np.testing.assert_array_equal(with_eta.s, without.s)
    np.testing.assert_array_equal(with_eta.noise_draws, without.noise_draws)


def test_draws_are_counted_as_diffusers_draws() -> None:
    assert samplers.schedule("ddim", ON_DISK, 4).noise_draws.tolist() == [0] * 4
    assert samplers.schedule("ddim", ON_DISK, 4, eta=0.5).noise_draws.tolist() == [1] * 4
    ancestral = samplers.schedule("euler_a", ON_DISK, 4)
    assert ancestral.noise_draws.tolist() == [1] * 4
    assert ancestral.s[-1] == 0


def test_memory_is_short() -> None:
    assert {name: samplers.schedule(name, ON_DISK, 20).memory for name in samplers.SAMPLERS} == {
        "ddim": 1,
        "pndm": 5,
        "euler": 1,
        "euler_a": 1,
        "dpmpp_2m": 2,
    }
    assert samplers.schedule("pndm", ON_DISK | {"skip_prk_steps": False}, 20).memory == 13


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_sampler_goes_by_both_names(name: str) -> None:
    sampler = samplers.find(name)
    assert samplers.find(sampler.class_name) is sampler


# Refusals.


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"found sampler 'ddmi', expected one of ddim \(DDIMScheduler\), pndm"):
        samplers.schedule("ddmi", {}, 10)


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("ddim", "thresholding", True, "expected False"),
        ("ddim", "timestep_spacing", "leadng", "expected 'leading' or 'linspace' or 'trailing'"),
        ("ddim", "prediction_type", "velocity", "expected 'epsilon' or 'v_prediction' or 'sample'"),
        ("ddim", "beta_schedule", "sigmoid", "expected 'linear' or 'scaled_linear' or 'squaredcos_cap_v2'"),
        ("ddim", "clip_sample", 1, "Expected `bool`, got `int`"),
        ("ddim", "clip_sample_range", 0.0, "Expected `float` > 0"),
        ("ddim", "num_train_timesteps", "1000", "Expected `int`, got `str`"),
        ("ddim", "steps_offset", -1, "Expected `int` >= 0"),
        ("ddim", "steps_offset", True, "Expected `int`, got `bool`"),
        ("ddim", "beta_start", None, "Expected `float`, got `null`"),
        ("ddim", "trained_betas", [0.1, "0.2"], "Expected `float`, got `str`"),
        ("pndm", "prediction_type", "sample", "expected 'epsilon' or 'v_prediction'"),
        ("euler", "use_beta_sigmas", True, "expected False"),
        ("euler", "use_exponential_sigmas", True, "expected False"),
        ("euler", "timestep_type", "continuous", "expected 'discrete'"),
        ("euler", "final_sigmas_type", "one", "expected 'zero' or 'sigma_min'"),
        ("euler_a", "prediction_type", "sample", "expected 'epsilon' or 'v_prediction'"),
        ("dpmpp_2m", "solver_order", 3, "expected 1 or 2"),
        ("dpmpp_2m", "solver_order", True, "expected 1 or 2"),
        ("dpmpp_2m", "algorithm_type", "sde-dpmsolver++", "expected 'dpmsolver\\+\\+' or 'deis'"),
        ("dpmpp_2m", "algorithm_type", "dpmsolver", "expected 'dpmsolver\\+\\+' or 'deis'"),
        ("dpmpp_2m", "use_lu_lambdas", True, "expected False"),
        ("dpmpp_2m", "use_flow_sigmas", True, "expected False"),
        ("dpmpp_2m", "prediction_type", "flow_prediction", "expected 'epsilon' or 'v_prediction' or 'sample'"),
        ("dpmpp_2m", "variance_type", "learned", "Expected `null`, got `str`"),
        ("dpmpp_2m", "thresholding", True, "expected False"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused(name: str, key: str, value: object, expected: str) -> None:
    with pytest.raises(RequestError, match=f"says {key}: .*Scheduler cannot honour here: {expected}.*change {key}"):
        samplers.schedule(name, {key: value}, 10)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler_a"])
def test_karras_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(RequestError, match="has no such noise levels; those that have: euler, dpmpp_2m"):
        samplers.schedule(name, ON_DISK, 10, karras=True)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "10"], ids=repr)
def test_what_is_not_a_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(RequestError, match="expected a whole number of at least 1"):
        samplers.schedule("ddim", ON_DISK, steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_an_eta_outside_its_range_is_refused(eta: float) -> None:
    with pytest.raises(RequestError, match="expected a number from 0 to 1"):
        samplers.schedule("ddim", ON_DISK, 10, eta=eta)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_more_steps_than_timesteps_are_refused(name: str, spacing: str) -> None:
    with pytest.raises(RequestError, match=r"found 1001 steps, but .*; ask for at most that many"):
        samplers.schedule(name, {"timestep_spacing": spacing}, 1001)


def test_dpm_solver_needs_one_timestep_more_than_steps() -> None:
    with pytest.raises(RequestError, match=r"found 1000 steps, but leading spacing has room for 999"):
        samplers.schedule("dpmpp_2m", {"timestep_spacing": "leading"}, 1000)


def test_dpm_solver_without_usable_timesteps_is_refused() -> None:
    with pytest.raises(RequestError, match="has room for 0"):
        samplers.schedule("dpmpp_2m", {"lambda_min_clipped": 100.0}, 5)


def test_the_warm_up_of_pndm_needs_four_steps() -> None:
    with pytest.raises(RequestError, match="found 3 steps, but the Runge-Kutta warm-up of PNDM needs at least 4"):
        samplers.schedule("pndm", {}, 3)


@pytest.mark.parametrize("name", ["ddim", "pndm"])
def test_an_offset_beyond_training_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="found a step at timestep 1009, but training has only 0 to 999"):
        samplers.schedule(name, {"steps_offset": 10}, 1000)


def test_epsilon_from_pure_noise_is_refused() -> None:
    with pytest.raises(RequestError, match="epsilon says nothing of the picture"):
        samplers.schedule("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10)


def test_ancestral_sampling_over_rising_noise_is_refused() -> None:
    with pytest.raises(RequestError, match="found noise levels that rise"):
        samplers.schedule("euler_a", {"rescale_betas_zero_snr": True}, 1000)


def test_two_steps_at_one_noise_level_have_no_slope() -> None:
    config = {"timestep_spacing": "leading", "steps_offset": 1000}  # beyond training every level is that of its end
    with pytest.raises(RequestError, match="found two steps at the same noise level"):
        samplers.schedule("dpmpp_2m", config, 10)

"""How a scheduler's configuration is read, and what is refused."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import diffusers
import pytest

from latentrt import samplers
from latentrt.errors import RequestError
from latentrt.samplers.options import Sampler
from tests.runtime.test_samplers import ON_DISK

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


@pytest.mark.parametrize("name", sorted(set(samplers.SAMPLERS) - {"ddim"}))
def test_eta_is_refused_where_it_means_nothing(name: str) -> None:
    with pytest.raises(RequestError, match=r"found eta 0\.5 with \w+, which takes none; leave it at 0, or use ddim"):
        samplers.schedule(name, ON_DISK, 5, eta=0.5)


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
    with pytest.raises(RequestError, match="says nothing of the picture"):
        samplers.schedule("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10)


def test_ancestral_sampling_over_rising_noise_is_refused() -> None:
    with pytest.raises(RequestError, match="found noise levels that rise"):
        samplers.schedule("euler_a", {"rescale_betas_zero_snr": True}, 1000)


def test_two_steps_at_one_noise_level_have_no_slope() -> None:
    config = {"timestep_spacing": "leading", "steps_offset": 1000}  # beyond training every level is that of its end
    with pytest.raises(RequestError, match="found two steps at the same noise level"):
        samplers.schedule("dpmpp_2m", config, 10)

"""What of samplers is refused, and in which words."""

from __future__ import annotations

from typing import Any

import pytest

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps
from tests.runtime.sampling.test_samplers import ON_DISK


def test_an_unknown_sampler_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        RequestError,
        match=r"found sampler 'ddmi', expected one of ddim, ddim_inverse, .*`latentrt samplers` lists them all",
    ):
        samplers.schedule("ddmi", {}, 10)


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("ddim", "thresholding", 1, "Expected `bool`"),
        ("ddim", "dynamic_thresholding_ratio", 1.5, "Expected `float` <= 1.0"),
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
        ("euler", "timestep_type", "whole", "expected 'discrete' or 'continuous'"),
        ("euler", "final_sigmas_type", "one", "expected 'zero' or 'sigma_min'"),
        ("euler_a", "prediction_type", "sample", "expected 'epsilon' or 'v_prediction'"),
        ("dpmpp_2m", "solver_order", 4, "expected 1 or 2 or 3"),
        ("dpmpp_2m", "solver_order", True, "expected 1 or 2 or 3"),
        ("dpmpp_2m", "algorithm_type", "unipc", "expected 'dpmsolver' or 'dpmsolver\\+\\+' or"),
        ("dpmpp_2m", "prediction_type", "x0", "expected 'epsilon' or 'v_prediction' or 'sample' or 'flow_prediction'"),
        ("dpmpp_2m", "variance_type", "learned", "Invalid enum value 'learned'"),
        ("unipc", "solver_p", {"_class_name": "DDIMScheduler"}, "Expected `null`"),
        ("flow_lcm", "scale_factors", [0.5, 1.0], "Expected `null`"),
        ("sa_solver", "tau_func", "constant", "Expected `null`"),
    ],
)
def test_a_value_that_cannot_be_honoured_is_refused(name: str, key: str, value: object, expected: str) -> None:
    with pytest.raises(RequestError, match=f"says {key}: .*Scheduler cannot honour here: {expected}.*change {key}"):
        samplers.schedule(name, {key: value}, 10)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler_a"])
def test_karras_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(RequestError, match=r"has no such noise levels; those that have: euler, heun, .*dpmpp_2m"):
        samplers.schedule(name, ON_DISK, 10, karras=True)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "10"], ids=repr)
def test_what_is_not_a_number_of_steps_is_refused(steps: Any) -> None:
    with pytest.raises(RequestError, match="expected a whole number of at least 1"):
        samplers.schedule("ddim", ON_DISK, steps)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"eta": -0.1}, "found eta -0.1, expected a number from 0 to 1"),
        ({"eta": 1.1}, "expected a number from 0 to 1"),
        ({"eta": float("nan")}, "expected a number from 0 to 1"),
        ({"eta": "0.5"}, "expected a number from 0 to 1"),
        ({"begin": 10}, "found begin 10 of 10 steps, expected at most 9"),
        ({"begin": None}, "found begin None, expected a whole number of at least 0"),
        ({"s_churn": -1.0}, "found s_churn -1.0, expected a number of at least 0"),
        ({"timesteps": ()}, "timesteps: found \\(\\), expected a list of numbers"),
        ({"timesteps": 5}, "timesteps: found 5, expected a list of numbers"),
        ({"timesteps": (5, "a")}, "expected a list of numbers"),
        ({"timesteps": (5, float("nan"))}, "expected a list of numbers"),
        ({"timesteps": (100, 900)}, "timesteps: found 100, 900, expected them to descend"),
        ({"sigmas": (1.0, 1.0)}, "sigmas: found 1, 1, expected them to descend"),
        ({"sigmas": (1.0,), "timesteps": (1,)}, "found both timesteps and sigmas"),
    ],
    ids=str,
)
def test_steps_that_are_none_are_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Steps(count=10, **asked)


def test_an_option_that_a_sampler_does_not_have_is_refused_with_those_it_has() -> None:
    with pytest.raises(
        RequestError, match=r"found option 'solver_ordr', which unipc does not have; expected one of .*solver_order"
    ):
        samplers.schedule("unipc", ON_DISK, 10, options={"solver_ordr": 2})


def test_a_grid_beyond_training_is_refused() -> None:
    for name in ("euler", "heun", "dpmpp_2m", "ddpm", "lcm"):
        with pytest.raises(RequestError, match="found timestep 1000, but training has only 0 to 999"):
            samplers.schedule(name, ON_DISK, 2, options={"timesteps": [1000, 5]})
    with pytest.raises(RequestError, match=r"found timestep 10\.5, expected whole ones with DDPMScheduler"):
        samplers.schedule("ddpm", ON_DISK, 2, options={"timesteps": [10.5, 5]})


@pytest.mark.parametrize("name", ["repaint", "karras_ve", "sde_ve", "vq_diffusion"])
def test_what_is_more_than_a_table_is_not_drawn_with(name: str) -> None:
    with pytest.raises(RequestError, match=f"found sampler {name}, which is more than a table: it"):
        samplers.check_suits(name, "PNDMScheduler")


@pytest.mark.parametrize("name", ["ddim_inverse", "dpmpp_2m_inverse"])
def test_what_goes_backwards_does_not_draw(name: str) -> None:
    with pytest.raises(RequestError, match="which goes from a picture to the noise"):
        samplers.check_suits(name, "PNDMScheduler")


@pytest.mark.parametrize(("wrong", "near"), [("eular", "euler"), ("dpmp_2m", "dpmpp_2m"), ("Unipcc", "unipc")])
def test_a_slip_of_the_pen_is_told_what_is_near(wrong: str, near: str) -> None:
    with pytest.raises(RequestError, match=rf"found sampler '{wrong}', .*\(near it: .*{near}"):
        samplers.choose(wrong)


def test_levels_are_spread_once() -> None:
    with pytest.raises(RequestError, match="which spreads its noise levels twice"):
        samplers.choose("lms_karras_beta")
    with pytest.raises(RequestError, match="found sigmas and use_karras_sigmas, expected one of them"):
        samplers.schedule("euler_karras", {}, 5, options={"sigmas": [14.0, 1.0, 0.0]})


def test_numbers_that_make_no_table_are_refused_in_a_sentence() -> None:
    for name, options in (
        ("euler", {"beta_end": 0.9}),
        ("ddim", {"beta_end": 1.0}),
    ):
        with pytest.raises(
            RequestError, match=r"no table of finite numbers|says nothing of the picture|adds no noise or more than all"
        ):
            samplers.schedule(name, {}, 50, options=options)


def test_a_sampler_for_another_kind_of_model_is_not_drawn_with() -> None:
    with pytest.raises(
        RequestError, match="found sampler flow_euler for flow models, but this bundle's model is one of diffusion"
    ):
        samplers.check_suits("flow_euler", "DDIMScheduler")
    samplers.check_suits("flow_heun", "FlowMatchEulerDiscreteScheduler")
    samplers.check_suits("heun", "SomebodysOwnScheduler")


def test_ends_of_levels_that_are_another_class_s_are_not_passed_over() -> None:
    config = ON_DISK | {"sigma_min": 0.1, "sigma_max": None}
    with pytest.raises(RequestError, match=r"says sigma_min: 0\.1, which HeunDiscreteScheduler has no such option for"):
        samplers.schedule("heun", config, 5, karras=True)
    assert len(samplers.schedule("heun", config, 5)) == 9
    assert samplers.schedule("euler", config, 5, karras=True).sigma[-1] == pytest.approx(0.1)


def test_vq_diffusion_has_no_table() -> None:
    with pytest.raises(RequestError, match="which therefore has no table"):
        samplers.schedule("vq_diffusion", {"num_vec_classes": 8}, 5)
    with pytest.raises(RequestError, match="found no num_vec_classes"):
        samplers.schedule("vq_diffusion", {}, 5)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "heun", "lms", "dpmpp_2m", "deis", "unipc", "sa_solver"])
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

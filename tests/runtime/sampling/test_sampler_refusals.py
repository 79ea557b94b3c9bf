"""Errors of samplers: each names the option as the caller wrote it."""

from __future__ import annotations

from typing import Any

import pytest

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps
from tests.runtime.sampling.sampler_grid import ON_DISK
from tests.runtime.sampling.sampler_refusals import REFUSED, refused


@pytest.mark.parametrize("name", REFUSED)
def test_refused_combinations_are_errors(name: str) -> None:
    for case in refused(name):
        with pytest.raises(RequestError):
            samplers.schedule(name, case.config, case.steps(10))


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("ddim", "thresholding", 1, "`bool`"),
        ("ddim", "dynamic_thresholding_ratio", 1.5, "<= 1.0"),
        ("ddim", "timestep_spacing", "leadng", "'leading' or 'linspace' or 'trailing'"),
        ("ddim", "prediction_type", "velocity", "'epsilon' or 'v_prediction' or 'sample'"),
        ("ddim", "beta_schedule", "sigmoid", "'linear' or 'scaled_linear' or 'squaredcos_cap_v2'"),
        ("ddim", "clip_sample", 1, "`bool`"),
        ("ddim", "clip_sample_range", 0.0, "> 0"),
        ("ddim", "num_train_timesteps", "1000", "`int`"),
        ("ddim", "steps_offset", -1, ">= 0"),
        ("ddim", "steps_offset", True, "`int`"),
        ("ddim", "beta_start", None, "`float`"),
        ("ddim", "trained_betas", [0.1, "0.2"], "`float`"),
        ("pndm", "prediction_type", "sample", "'epsilon' or 'v_prediction'"),
        ("euler", "timestep_type", "whole", "'discrete' or 'continuous'"),
        ("euler", "final_sigmas_type", "one", "'zero' or 'sigma_min'"),
        ("euler_a", "prediction_type", "sample", "'epsilon' or 'v_prediction'"),
        ("dpmpp_2m", "solver_order", 4, "1 or 2 or 3"),
        ("dpmpp_2m", "solver_order", True, "1 or 2 or 3"),
        ("dpmpp_2m", "algorithm_type", "unipc", "'dpmsolver++'"),
        ("dpmpp_2m", "prediction_type", "x0", "'flow_prediction'"),
        ("dpmpp_2m", "variance_type", "learned", "'learned'"),
        ("unipc", "solver_p", {"_class_name": "DDIMScheduler"}, "`null`"),
        ("flow_lcm", "scale_factors", [0.5, 1.0], "`null`"),
        ("sa_solver", "tau_func", "constant", "`null`"),
    ],
)
def test_an_unsupported_value_is_an_error_with_the_supported_ones(
    name: str, key: str, value: object, expected: str
) -> None:
    with pytest.raises(RequestError) as refusal:
        samplers.schedule(name, {key: value}, 10)
    message = str(refusal.value)
    assert f"`{key}`={value!r}" in message
    assert expected in message


@pytest.mark.parametrize(
    ("name", "near"), [("ddmi", "ddim"), ("eular", "euler"), ("dpmp_2m", "dpmpp_2m"), ("Unipcc", "unipc")]
)
def test_an_unknown_sampler_is_an_error_with_similar_names(name: str, near: str) -> None:
    with pytest.raises(RequestError, match=rf"`sampler`: got '{name}'.*\(did you mean .*{near}"):
        samplers.choose(name)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler_a"])
def test_karras_needs_a_sampler_with_spacings(name: str) -> None:
    with pytest.raises(RequestError, match=r"karras.*euler, heun, .*dpmpp_2m"):
        samplers.schedule(name, ON_DISK, 10, karras=True)


@pytest.mark.parametrize("steps", [0, -1, 2.0, True, "10"], ids=repr)
def test_the_number_of_steps_is_a_positive_integer(steps: Any) -> None:
    with pytest.raises(RequestError, match="`num_inference_steps`"):
        samplers.schedule("ddim", ON_DISK, steps)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"eta": -0.1}, "`eta`=-0.1"),
        ({"eta": 1.1}, "from 0 to 1"),
        ({"eta": float("nan")}, "`eta`=nan"),
        ({"eta": "0.5"}, "`eta`='0.5'"),
        ({"begin": 10}, "`begin`: got 10 with 10 steps"),
        ({"begin": None}, "`begin`=None"),
        ({"s_churn": -1.0}, "`s_churn`=-1.0"),
        ({"timesteps": ()}, "`timesteps`="),
        ({"timesteps": 5}, "`timesteps`=5"),
        ({"timesteps": (5, "a")}, "`timesteps`="),
        ({"timesteps": (5, float("nan"))}, "`timesteps`="),
        ({"timesteps": (100, 900)}, "`timesteps`=[100, 900], expected descending"),
        ({"sigmas": (1.0, 1.0)}, "`sigmas`=[1, 1], expected descending"),
        ({"sigmas": (1.0,), "timesteps": (1,)}, "`timesteps` and `sigmas`"),
    ],
    ids=str,
)
def test_options_of_a_run_are_checked(options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(RequestError) as refusal:
        Steps(count=10, **options)
    assert fragment in str(refusal.value)


def test_an_unknown_option_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"unipc .*'solver_ordr'.*solver_order"):
        samplers.schedule("unipc", ON_DISK, 10, options={"solver_ordr": 2})


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "ddpm", "lcm"])
def test_given_timesteps_are_within_training(name: str) -> None:
    with pytest.raises(RequestError, match="`timesteps` has 1000"):
        samplers.schedule(name, ON_DISK, 2, options={"timesteps": [1000, 5]})


def test_given_timesteps_are_whole_where_constants_are_looked_up() -> None:
    with pytest.raises(RequestError, match=r"`timesteps` has 10\.5"):
        samplers.schedule("ddpm", ON_DISK, 2, options={"timesteps": [10.5, 5]})


@pytest.mark.parametrize("name", ["repaint", "karras_ve", "sde_ve", "vq_diffusion"])
def test_the_pipeline_does_not_run_samplers_that_need_more_than_a_table(name: str) -> None:
    with pytest.raises(RequestError) as refusal:
        samplers.check_suits(name, "PNDMScheduler")
    assert samplers.find(name).unsupported_reason in str(refusal.value)


@pytest.mark.parametrize("name", ["ddim_inverse", "dpmpp_2m_inverse"])
def test_the_pipeline_does_not_run_an_inverse(name: str) -> None:
    with pytest.raises(RequestError, match=f"`sampler` {name}"):
        samplers.check_suits(name, "PNDMScheduler")


def test_sigmas_are_spaced_once() -> None:
    with pytest.raises(RequestError, match="'lms_karras_beta'"):
        samplers.choose("lms_karras_beta")
    with pytest.raises(RequestError, match="`sigmas` and `use_karras_sigmas`"):
        samplers.schedule("euler_karras", {}, 5, options={"sigmas": [14.0, 1.0, 0.0]})


@pytest.mark.parametrize(("name", "options"), [("euler", {"beta_end": 0.9}), ("ddim", {"beta_end": 1.0})])
def test_a_table_that_is_not_finite_is_an_error(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        samplers.schedule(name, {}, 50, options=options)


def test_a_sampler_suits_its_kind_of_model() -> None:
    with pytest.raises(RequestError, match=r"flow_euler for flow models.* diffusion model"):
        samplers.check_suits("flow_euler", "DDIMScheduler")
    samplers.check_suits("flow_heun", "FlowMatchEulerDiscreteScheduler")
    samplers.check_suits("heun", "SomebodysOwnScheduler")


def test_ends_of_sigmas_are_not_ignored() -> None:
    config = ON_DISK | {"sigma_min": 0.1, "sigma_max": None}
    with pytest.raises(RequestError, match=r"`sigma_min`=0\.1"):
        samplers.schedule("heun", config, 5, karras=True)
    assert len(samplers.schedule("heun", config, 5)) == 9
    assert samplers.schedule("euler", config, 5, karras=True).sigma[-1] == pytest.approx(0.1)


def test_vq_diffusion_has_no_table() -> None:
    with pytest.raises(RequestError, match="no table"):
        samplers.schedule("vq_diffusion", {"num_vec_classes": 8}, 5)
    with pytest.raises(RequestError, match="`num_vec_classes`"):
        samplers.schedule("vq_diffusion", {}, 5)


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "heun", "lms", "dpmpp_2m", "deis", "unipc", "sa_solver"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_there_are_at_most_as_many_steps_as_timesteps(name: str, spacing: str) -> None:
    with pytest.raises(RequestError, match=r"1001 steps \(`num_inference_steps`\), expected at most (999|1000)"):
        samplers.schedule(name, {"timestep_spacing": spacing}, 1001)


@pytest.mark.parametrize(
    ("name", "config", "steps", "fragment"),
    [
        ("dpmpp_2m", {"timestep_spacing": "leading"}, 1000, "at most 999"),
        ("dpmpp_2m", {"lambda_min_clipped": 100.0}, 5, "at most 0"),
        ("pndm", {}, 3, "at least 4"),
        ("ddim", {"steps_offset": 10}, 1000, "timestep 1009"),
        ("pndm", {"steps_offset": 10}, 1000, "timestep 1009"),
        ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10, "`prediction_type`"),
        ("euler_a", {"rescale_betas_zero_snr": True}, 1000, "sigma rises"),
        # Beyond training every sigma is that of its end.
        ("dpmpp_2m", {"timestep_spacing": "leading", "steps_offset": 1000}, 10, "same sigma"),
        ("karras_ve", {"s_max": 1e9}, 10, "`s_max`"),
        ("ipndm", {"trained_betas": [1.0, 0.5]}, 10, "`trained_betas`"),
        ("unclip", {}, 1, "`num_inference_steps`: got 1"),
        ("lcm", {}, 51, "at most 50"),
        ("flow_euler", {"use_dynamic_shifting": True}, 5, "`mu`"),
    ],
)
def test_configurations_without_a_table(name: str, config: dict[str, Any], steps: int, fragment: str) -> None:
    with pytest.raises(RequestError) as refusal:
        samplers.schedule(name, config, steps)
    assert fragment in str(refusal.value)


@pytest.mark.parametrize("name", ["euler_karras_karras", "euler" + "_beta" * 15, "Euler a Karras Exponential"])
def test_a_name_has_one_suffix(name: str) -> None:
    with pytest.raises(RequestError, match="two spacings"):
        samplers.choose(name)


@pytest.mark.parametrize("length", [samplers.MAX_NAME_LENGTH + 1, 1_000_000])
def test_a_long_name_is_compared_with_nothing(length: int) -> None:
    """Each suffix was a call of its own, and similar names are searched for in quadratic time."""
    with pytest.raises(RequestError, match=f"{length:,} letters"):
        samplers.choose(("Karras " * length)[:length])


@pytest.mark.parametrize("key", ["num_train_timesteps", "trained_betas"])
def test_a_configuration_allocates_no_more_than_a_million_timesteps(key: str) -> None:
    value = 10**12 if key == "num_train_timesteps" else [0.1] * 1_000_001
    for name in ("ddim", "euler", "lcm"):
        with pytest.raises(RequestError, match=key):
            samplers.schedule(name, {key: value}, 10)

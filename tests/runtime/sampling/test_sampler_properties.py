from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers import SAMPLERS, Steps
from latentrt.sampling.samplers.aliases import ALIASES, SPACING_SUFFIXES
from latentrt.sampling.samplers.sde_ve import langevin
from latentrt.sampling.schedule import Recurrence
from tests.runtime.sampling.sampler_grid import ON_DISK, OPTIONS, STABLE_DIFFUSION, cases

COUNTS = (1, 2, 3, 7, 16, 25, 61, 80)
# Whose noise rises: from an image to noise.
INVERSE = {"ddim_inverse", "dpmpp_2m_inverse"}


def test_every_table_is_compared_with_diffusers() -> None:
    assert OPTIONS.keys() == SAMPLERS.keys() - {"vq_diffusion"}  # which has a test of its own


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_finite_and_noise_falls(name: str) -> None:
    """`Schedule` rejects values that are not finite."""
    made = 0
    for i, case in enumerate(cases(name)):
        count = COUNTS[i % len(COUNTS)]
        try:
            schedule = samplers.schedule(name, case.config, case.steps(count))
        except RequestError:
            continue
        made += 1
        assert np.all(schedule.alpha >= 0)
        assert np.all(schedule.sigma >= 0)
        if name in ("repaint", "karras_ve", "pndm") or case.config.get("invert_sigmas"):
            continue  # they jump back, add noise, repeat a timestep, or run in reverse
        change = np.diff(np.arctan2(schedule.sigma, schedule.alpha))
        if name in INVERSE and not case.config.get("use_flow_sigmas"):
            change = -change
        assert np.all(change <= 1e-12), (case, count)
    assert made >= len(cases(name)) // 2


@pytest.mark.parametrize("name", OPTIONS)
def test_a_table_has_as_many_rows_as_evaluations(name: str) -> None:
    sampler = SAMPLERS[name].read({"beta_schedule": "squaredcos_cap_v2"})
    compared = 0
    for count in COUNTS:
        try:
            schedule = sampler.schedule(Steps(count=count))
        except RequestError:
            continue
        corrector = count * getattr(sampler, "correct_steps", 0)  # not in the table
        assert len(schedule) + corrector == sampler.evaluations(count)
        compared += 1
    assert compared >= 4


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_has_a_table(alias: str) -> None:
    choice = samplers.choose(alias)
    table, plain = (
        samplers.schedule(alias, ON_DISK, 8),
        samplers.schedule(choice.name, ON_DISK, 8, options=choice.options),
    )
    np.testing.assert_array_equal(table.b, plain.b)
    assert choice.options.keys() <= choice.sampler.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("name", "known", "options"),
    [
        ("Euler a", "euler_a", {}),
        ("DPM++ 2M Karras", "dpmpp_2m", {"use_karras_sigmas": True}),
        ("DPM++ 2M SDE Exponential", "dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "use_exponential_sigmas": True}),
        ("DPM++ 3M SDE", "dpmpp_2m", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
        ("DPM2 a Karras", "dpm2_a", {"use_karras_sigmas": True}),
        ("dpm_2_ancestral", "dpm2_a", {}),
        ("LMS Karras", "lms", {"use_karras_sigmas": True}),
        ("PLMS", "pndm", {"skip_prk_steps": True}),
        ("UniPC", "unipc", {}),
        ("uni_pc_bh2", "unipc", {"solver_type": "bh2"}),
        ("DPM++ SDE", "dpmpp_sde", {}),
        ("heun_beta", "heun", {"use_beta_sigmas": True}),
        ("k_euler_a", "euler_a", {}),
        ("DDIMScheduler", "ddim", {}),
    ],
)
def test_names_of_other_tools(name: str, known: str, options: dict[str, Any]) -> None:
    choice = samplers.choose(name)
    assert choice.name == known
    assert {key: value for key, value in choice.options.items() if value} == options


@pytest.mark.parametrize("name", ["ddim_karras", "pndm_beta", "tcd_exponential"])
def test_a_spacing_suffix_needs_a_sampler_with_spacings(name: str) -> None:
    with pytest.raises(RequestError, match=r"euler.*unipc"):
        samplers.choose(name)


@pytest.mark.parametrize("suffix", SPACING_SUFFIXES)
def test_a_suffix_alone_is_unknown(suffix: str) -> None:
    with pytest.raises(RequestError, match="`sampler`"):
        samplers.choose(suffix)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize(("spacing", "count"), [("leading", 1), ("leading", 7), ("leading", 100), ("trailing", 25)])
@pytest.mark.parametrize("value", [-1.0, 0.3])
def test_ddim_and_its_inverse_return_to_the_start(
    set_alpha_to_one: bool, spacing: str, count: int, value: float
) -> None:
    """With a constant model output; trailing only with counts that divide 1000: otherwise both step by ⌊T / n⌋ between
    different timesteps."""
    config = STABLE_DIFFUSION | {
        "timestep_spacing": spacing,
        "set_alpha_to_one": set_alpha_to_one,
        "clip_sample": False,
    }
    start = Generator(1).normal((4, 4, 4))
    x = start
    for name in ("ddim", "ddim_inverse"):
        schedule = samplers.schedule(name, config, count)
        recurrence = Recurrence(schedule)
        for k in range(len(schedule)):
            x = recurrence.step(k, x, np.full_like(x, value))
    # Float32; the image in between is 15 times as large as the noise.
    np.testing.assert_allclose(x, start, atol=5e-5)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("steps", [2, 9, 60])
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm2", "dpmpp_2m", "dpmpp_2s", "unipc"])
def test_a_perfect_model_ends_at_its_image(name: str, steps: int, spacing: str) -> None:
    config = STABLE_DIFFUSION | {"timestep_spacing": spacing, "clip_sample": False, "lower_order_final": True}
    schedule, value = samplers.schedule(name, config, steps), -1.7
    recurrence, shape = Recurrence(schedule), (1, 2, 2)
    x = Generator(0).normal(shape) * np.float32(schedule.init_noise_sigma)
    for k in range(len(schedule)):
        epsilon = (x - np.float32(schedule.alpha[k] * value)) / np.float32(schedule.sigma[k])
        x = recurrence.step(k, x, epsilon)
    # Float32, where x0 is computed from latents of 15 times its size.
    np.testing.assert_allclose(x, value, atol=2e-4)


def test_heun_stays_where_sigma_does() -> None:
    """The last Karras sigma is that of `final_sigmas_type` sigma_min: h = 0, and diffusers divides 0 by 0."""
    config = STABLE_DIFFUSION | {"solver_type": "heun", "final_sigmas_type": "sigma_min", "lower_order_final": False}
    schedule = samplers.schedule("dpmpp_2m", config, 20, karras=True)
    assert schedule.a[-1] == pytest.approx(1, abs=1e-6)  # sigmas are float32
    np.testing.assert_allclose(schedule.b[-1], 0, atol=1e-6)


def test_pndm_begins_where_diffusers_does() -> None:
    """In the middle of the list that has the second timestep twice; its two first rows then share a step."""
    begun = samplers.schedule("pndm", ON_DISK, Steps(count=10, begin=4))
    assert begun.t.tolist() == [601, 501, 401, 301, 201, 101, 1]
    assert samplers.schedule("pndm", ON_DISK, Steps(count=10, begin=1)).t.tolist()[:3] == [801, 801, 701]


def test_timesteps_and_a_strength_are_rejected() -> None:
    """diffusers counts the timesteps that it skips, and ends with noise."""
    with pytest.raises(RequestError, match="`timesteps` and `strength`"):
        samplers.schedule("lcm", {}, Steps(count=4, timesteps=(999, 759, 499, 259), strength=0.5))


def test_ancestral_steps_from_very_high_noise_are_finite() -> None:
    """σ falls from 20,291 to 0.9: diffusers takes the square root of a negative rounding error."""
    schedule = samplers.schedule("euler_a", {"beta_schedule": "squaredcos_cap_v2"}, 3)
    assert np.all(np.isfinite(schedule.a))


def test_langevin_needs_a_score() -> None:
    zero = np.zeros((2, 3, 4, 4), np.float32)
    with pytest.raises(RequestError, match="score of zero"):
        langevin(zero, zero, zero, 0.15)

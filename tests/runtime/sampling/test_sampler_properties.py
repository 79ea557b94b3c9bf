"""What holds of tables whatever diffusers does."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers import Steps
from latentrt.sampling.samplers.aliases import ALIASES, RESPACINGS
from latentrt.sampling.schedule import Recurrence, Schedule
from tests.runtime.sampling import diffusers_oracle as oracle
from tests.runtime.sampling.sampler_grid import Case, cases
from tests.runtime.sampling.sampler_values import OPTIONS, STABLE_DIFFUSION
from tests.runtime.sampling.test_samplers import ON_DISK, ORDINARY, TRAINED, assert_equals_diffusers

# Whose noise grows: backwards from a picture.
RISING = {"ddim_inverse", "dpmpp_2m_inverse"}


def table(case: Case, count: int) -> Schedule | None:
    """A case's table; None where there is none."""
    try:
        return samplers.schedule(case.name, case.config, case.steps(count))
    except RequestError:
        return None


@settings(deadline=None, max_examples=60)
@given(data=st.data(), count=st.integers(1, 80))
@pytest.mark.parametrize("name", OPTIONS)
def test_rows_are_finite_and_noise_falls(name: str, data: st.DataObject, count: int) -> None:
    case = data.draw(st.sampled_from(cases(name)))
    schedule = table(case, count)
    if schedule is None:
        return
    # `Schedule` itself refuses what is not finite; as float32, which the loop runs, it is so too.
    for column in (schedule.c_in, schedule.a, schedule.b, schedule.d, schedule.e, schedule.s, schedule.p, schedule.q):
        assert np.all(np.isfinite(column.astype(np.float32)))
    assert np.all(schedule.alpha >= 0)
    assert np.all(schedule.sigma >= 0)
    if name in ("repaint", "karras_ve") or case.config.get("invert_sigmas"):
        return  # which step back, raise their noise, or go the other way
    ratio = np.arctan2(schedule.sigma, schedule.alpha)
    steps = np.diff(ratio)
    if name in RISING and not case.config.get("use_flow_sigmas"):
        steps = -steps
    # PNDM's second evaluation and others' second stages stand where the next first one does.
    assert np.all(steps <= 1e-12) or name == "pndm", (case, count)


@settings(deadline=None, max_examples=25)
@given(count=st.integers(1, 60))
@pytest.mark.parametrize("name", OPTIONS)
def test_a_table_costs_what_it_says(name: str, count: int) -> None:
    sampler = samplers.SAMPLERS[name].read({"beta_schedule": "squaredcos_cap_v2"})
    try:
        schedule = sampler.schedule(Steps(count=count))
    except RequestError:
        return
    extra = count * getattr(sampler, "correct_steps", 0)  # the corrector's, beside the table
    assert len(schedule) + extra == sampler.evaluations(count)


@pytest.mark.parametrize("alias", ALIASES)
def test_every_alias_resolves_to_a_table(alias: str) -> None:
    choice = samplers.choose(alias)
    assert samplers.schedule(alias, ON_DISK, 8).t.tolist()
    assert choice.options.keys() <= samplers.schedule.__globals__["SAMPLERS"][choice.name].__dataclass_fields__.keys()


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
def test_levels_are_not_promised_to_those_that_have_none(name: str) -> None:
    with pytest.raises(RequestError, match=r"has no such noise levels; those that have: .*euler.*unipc"):
        samplers.choose(name)


@pytest.mark.parametrize("ending", RESPACINGS)
def test_an_ending_alone_is_no_name(ending: str) -> None:
    with pytest.raises(RequestError, match="found sampler"):
        samplers.choose(ending)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 100),
    spacing=st.sampled_from(["leading", "trailing"]),
    one=st.booleans(),
    value=st.floats(-1, 1),
)
def test_ddim_and_its_inverse_return_where_they_began(count: int, spacing: str, one: bool, value: float) -> None:
    """With a model output that is always the same. `trailing` only where the steps divide training evenly: elsewhere
    both jump by ⌊T / n⌋ between other levels."""
    if spacing == "trailing" and 1000 % count:
        return
    config = STABLE_DIFFUSION | {"timestep_spacing": spacing, "set_alpha_to_one": one, "clip_sample": False}
    start = Generator(1).normal((1, 4, 4, 4))
    x = start
    for name in ("ddim", "ddim_inverse"):
        schedule = samplers.schedule(name, config, count)
        recurrence = Recurrence(schedule)
        for k in range(len(schedule)):
            x = recurrence.step(k, x, np.full_like(x, value))
    # Float32; the picture in between is 15 times as large as the noise.
    np.testing.assert_allclose(x, start, atol=5e-5)


@settings(deadline=None, max_examples=20)
@given(steps=st.integers(2, 60), spacing=st.sampled_from(["leading", "linspace"]), value=st.floats(-2, 2))
@pytest.mark.parametrize("name", ["ddim", "euler", "heun", "dpm2", "dpmpp_2m", "dpmpp_2s", "unipc"])
def test_a_model_that_knows_the_picture_ends_at_it(name: str, steps: int, spacing: str, value: float) -> None:
    config = STABLE_DIFFUSION | {"timestep_spacing": spacing, "clip_sample": False, "lower_order_final": True}
    schedule = samplers.schedule(name, config, steps)
    recurrence, shape = Recurrence(schedule), (1, 1, 2, 2)
    x = Generator(0).normal(shape) * np.float32(schedule.init_noise_sigma)
    for k in range(len(schedule)):
        epsilon = (x - np.float32(schedule.alpha[k] * value)) / np.float32(schedule.sigma[k])
        x = recurrence.step(k, x, epsilon)
    # Float32, where x0 is read off a latent of 15 times its size.
    np.testing.assert_allclose(x, value, atol=2e-4)


@pytest.mark.parametrize("name", [each for each in ORDINARY if each != "unclip"])
def test_a_clean_latent_is_noised_as_diffusers_does(name: str) -> None:
    made = oracle.scheduler(samplers.find(name).class_name, ON_DISK, 10, exact=False)
    schedule = samplers.schedule(name, ON_DISK, 10)
    clean, noise = np.float32(0.6), np.float32(-1.3)
    for k, t in enumerate(made.timesteps):
        if getattr(made, "order", 1) == 2 and k % 2:
            continue  # nothing begins at a second stage, and diffusers has no level for it
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = made.add_noise(torch.tensor([clean]), torch.tensor([noise]), t[None]).item()
        found = schedule.alpha[k] * clean + schedule.sigma[k] * noise
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)  # float32 rounding


def test_trained_betas_are_used() -> None:
    betas = [0.01 + 0.0001 * i for i in range(100)]
    config = {"trained_betas": betas, "num_train_timesteps": 100, "clip_sample": False}
    for name in (each for each in TRAINED if each != "repaint"):  # which in diffusers takes arrays only
        assert_equals_diffusers(Case(name, config, {}), 10)

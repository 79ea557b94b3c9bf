"""Where diffusers goes wrong and the tables do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps
from latentrt.sampling.schedule import Schedule
from tests.runtime.sampling import diffusers_oddities as oddities
from tests.runtime.sampling import diffusers_oracle as oracle
from tests.runtime.sampling.sampler_values import STABLE_DIFFUSION
from tests.runtime.sampling.test_samplers import ON_DISK, TOLERANCE, TRAINED

SPACED = [
    name for name in TRAINED if hasattr(samplers.SAMPLERS[name], "timestep_spacing") and name not in ("lcm", "tcd")
]


@pytest.mark.parametrize("name", SPACED)
def test_trailing_spacing_stops_before_timestep_minus_one(name: str) -> None:
    config = ON_DISK | {"timestep_spacing": "trailing"}
    made = oracle.scheduler(samplers.find(name).class_name, config, 61, exact=True)
    schedule = samplers.schedule(name, config, 61)
    assert min(made.timesteps) == -1
    expected = made.timesteps[made.timesteps >= 0].numpy()
    if getattr(made, "order", 1) == 2:
        # Their second stages go by the level of timestep −1, ours to no noise at all.
        assert len(schedule) == 121
        np.testing.assert_allclose(schedule.t[::2], expected[::2][: len(schedule.t[::2])], atol=6e-4)
    else:
        np.testing.assert_array_equal(schedule.t, expected)


def test_heun_stays_where_the_noise_level_does() -> None:
    """Karras' last level is final_sigmas_type's sigma_min: h = 0, and diffusers divides 0 by 0."""
    config = STABLE_DIFFUSION | {"solver_type": "heun", "final_sigmas_type": "sigma_min", "lower_order_final": False}
    schedule = samplers.schedule("dpmpp_2m", config, 20, karras=True)
    assert schedule.a[-1] == pytest.approx(1, abs=1e-6)  # the levels are float32
    np.testing.assert_allclose(schedule.b[-1], 0, atol=1e-6)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc_ends_without_noise(solver_type: str) -> None:
    """With bh1, B(h) = h is infinite in the last step, and diffusers multiplies it by a difference of 0."""
    schedule = samplers.schedule("unipc", ON_DISK | {"solver_type": solver_type}, 10)
    assert schedule.a[-1] == 0
    made = oracle.scheduler("UniPCMultistepScheduler", ON_DISK | {"solver_type": solver_type}, 10, exact=True)
    *_, (_, last) = oracle.theirs(made)
    assert bool(np.all(np.isfinite(last))) == (solver_type == "bh2")


def rows(schedule: Schedule, made: Any, steps: Steps) -> float:
    """The largest difference of a row, of its largest coefficient."""
    return max(
        float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
        for found, expected in oracle.beside(schedule, made, steps)
    )


def test_lms_begins_with_what_it_has() -> None:
    """Begun in the middle, diffusers takes the first of four weights for a slope that has no companions yet."""
    steps = Steps(count=12, begin=5)
    schedule = samplers.schedule("lms", ON_DISK, steps)
    made = oracle.scheduler("LMSDiscreteScheduler", ON_DISK, steps, exact=True)
    assert rows(schedule, made, steps) > 0.1
    euler = samplers.schedule("euler", ON_DISK, steps)
    first = schedule.a[0] + schedule.b[0, 0] * schedule.p[0], schedule.d[0] + schedule.b[0, 0] * schedule.q[0]
    of_euler = euler.a[0] + euler.b[0, 0] * euler.p[0], euler.d[0] + euler.b[0, 0] * euler.q[0]
    np.testing.assert_allclose(first, of_euler, rtol=1e-9)


def test_pndm_begins_as_at_the_start() -> None:
    """Begun in the middle, diffusers does not find the timestep that the first step takes twice, and from then on its
    latent is a step behind."""
    schedule = samplers.schedule("pndm", ON_DISK, Steps(count=10, begin=4))
    whole = samplers.schedule("pndm", ON_DISK, 10)
    assert schedule.t.tolist() == [501, 401, 401, 301, 201, 101, 1]
    assert whole.t.tolist()[-5:] == schedule.t.tolist()[-5:]


def test_dpm_solver_keeps_its_place_among_equal_timesteps() -> None:
    """Exponential levels over squared-cosine betas crowd at the noisy end, where timesteps are cut off to equal ones;
    looked up, the second of them is found, and a step is left out. With an index it is not."""
    config = {"beta_schedule": "squaredcos_cap_v2", "use_exponential_sigmas": True}
    schedule = samplers.schedule("dpmpp_2m", config, 40)
    assert len(set(schedule.t.tolist())) < 40
    made = oracle.scheduler("DPMSolverMultistepScheduler", config, 40, exact=True)
    assert rows(schedule, made, Steps(count=40)) <= TOLERANCE


def test_sa_solver_places_latents_on_its_own_levels() -> None:
    """diffusers takes α and σ of the whole timestep instead, which is another level where levels are spread anew."""
    config = STABLE_DIFFUSION | {"use_karras_sigmas": True}
    schedule = samplers.schedule("sa_solver", config, 10)
    made = oracle.scheduler("SASolverScheduler", config, 10, exact=True)
    np.testing.assert_allclose(schedule.sigma / schedule.alpha, made.sigmas[:10], rtol=1e-12)
    expected = oddities.noised(made, 4, 0.6, -1.3)
    assert expected != pytest.approx(schedule.alpha[4] * 0.6 - schedule.sigma[4] * 1.3, rel=1e-4)


def test_lcm_ends_with_a_picture() -> None:
    """With timesteps and a strength, diffusers counts those that it leaves out, and ends with noise. Refused here."""
    with pytest.raises(RequestError, match=r"found timesteps and strength 0\.5, expected one of them"):
        samplers.schedule("lcm", {}, Steps(count=4, timesteps=(999, 759, 499, 259), strength=0.5))


@pytest.mark.parametrize(("name", "config"), [("karras_ve", {"s_max": 1e9}), ("ipndm", {"trained_betas": [1.0, 0.5]})])
def test_what_diffusers_takes_and_a_table_cannot_say_is_refused(name: str, config: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="found"):
        samplers.schedule(name, config, 10)


def test_ancestral_steps_from_very_high_noise_are_numbers() -> None:
    """σ falls from 20,291 to 0.9: in float32 diffusers takes the square root of a negative rounding error."""
    schedule = samplers.schedule("euler_a", {"beta_schedule": "squaredcos_cap_v2"}, 3)
    assert np.all(np.isfinite(schedule.a))

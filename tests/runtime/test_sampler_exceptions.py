"""Where diffusers goes wrong and the tables do not."""

from __future__ import annotations

import numpy as np
import pytest

from latentrt import samplers
from tests.runtime import diffusers_oracle as oracle
from tests.runtime.test_samplers import ON_DISK, STABLE_DIFFUSION, TOLERANCE


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_trailing_spacing_stops_before_timestep_minus_one(name: str) -> None:
    config = ON_DISK | {"timestep_spacing": "trailing"}
    made = oracle.scheduler(samplers.find(name).class_name, config, 61, exact=True)
    schedule = samplers.schedule(name, config, 61)
    assert made.timesteps[-1] == -1
    np.testing.assert_array_equal(schedule.t, made.timesteps[:-1].numpy())


@pytest.mark.parametrize("final_sigmas_type", ["zero", "sigma_min"])
def test_deis_is_read_as_dpm_solver(final_sigmas_type: str) -> None:
    """diffusers reads it so too, but first refuses it with its own default of final_sigmas_type, `zero`."""
    config = ON_DISK | {"final_sigmas_type": final_sigmas_type}
    expected = oracle.scheduler("DPMSolverMultistepScheduler", config, 10, exact=True)
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

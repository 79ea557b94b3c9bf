"""Where diffusers is wrong and the tables are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps
from latentrt.sampling.schedule import Schedule
from tests.parity.sampling import diffusers_oracle as oracle
from tests.parity.sampling.test_samplers import TOLERANCE
from tests.runtime.sampling.sampler_grid import ON_DISK, STABLE_DIFFUSION, TRAINED

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
        # Their second stages use sigma of timestep −1, ours go to sigma 0.
        assert len(schedule) == 121
        np.testing.assert_allclose(schedule.t[::2], expected[::2][: len(schedule.t[::2])], atol=6e-4)
    else:
        np.testing.assert_array_equal(schedule.t, expected)


@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc_ends_without_noise(solver_type: str) -> None:
    """With bh1, B(h) = h is infinite in the last step, and diffusers multiplies it by a difference of 0."""
    schedule = samplers.schedule("unipc", ON_DISK | {"solver_type": solver_type}, 10)
    assert schedule.a[-1] == 0
    made = oracle.scheduler("UniPCMultistepScheduler", ON_DISK | {"solver_type": solver_type}, 10, exact=True)
    *_, (_, last) = oracle.coefficients(made)
    assert bool(np.all(np.isfinite(last))) == (solver_type == "bh2")


def largest_difference(schedule: Schedule, made: Any, steps: Steps) -> float:
    """Return the largest difference of a row, relative to its largest coefficient."""
    return max(
        float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
        for ours, theirs in oracle.compare(schedule, made, steps)
    )


def test_lms_begins_with_a_short_history() -> None:
    """Begun in the middle, diffusers uses the first of four weights with a history of one."""
    steps = Steps(count=12, begin=5)
    schedule = samplers.schedule("lms", ON_DISK, steps)
    made = oracle.scheduler("LMSDiscreteScheduler", ON_DISK, steps, exact=True)
    assert largest_difference(schedule, made, steps) > 0.1
    euler = samplers.schedule("euler", ON_DISK, steps)
    first = schedule.a[0] + schedule.b[0, 0] * schedule.p[0], schedule.d[0] + schedule.b[0, 0] * schedule.q[0]
    of_euler = euler.a[0] + euler.b[0, 0] * euler.p[0], euler.d[0] + euler.b[0, 0] * euler.q[0]
    np.testing.assert_allclose(first, of_euler, rtol=1e-9)


def test_dpm_solver_keeps_its_place_among_equal_timesteps() -> None:
    """Exponential sigmas over squared-cosine betas crowd at the noisy end, where timesteps are truncated to equal ones.

    Without a step index, diffusers looks the timestep up, finds the second, and skips a step."""
    config = {"beta_schedule": "squaredcos_cap_v2", "use_exponential_sigmas": True}
    schedule = samplers.schedule("dpmpp_2m", config, 40)
    assert len(set(schedule.t.tolist())) < 40
    made = oracle.scheduler("DPMSolverMultistepScheduler", config, 40, exact=True)
    assert largest_difference(schedule, made, Steps(count=40)) <= TOLERANCE


def test_sa_solver_noises_latents_to_its_own_sigmas() -> None:
    """diffusers uses α and σ of the rounded timestep instead, which differ where sigmas are spaced anew."""
    config = STABLE_DIFFUSION | {"use_karras_sigmas": True}
    schedule = samplers.schedule("sa_solver", config, 10)
    made = oracle.scheduler("SASolverScheduler", config, 10, exact=True)
    np.testing.assert_allclose(schedule.sigma / schedule.alpha, made.sigmas[:10], rtol=1e-12)
    expected = oracle.add_noise(made, 4, 0.6, -1.3)
    assert expected != pytest.approx(schedule.alpha[4] * 0.6 - schedule.sigma[4] * 1.3, rel=1e-4)

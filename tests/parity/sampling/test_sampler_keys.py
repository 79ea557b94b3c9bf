"""Keys of schedulers' configurations beside diffusers: those without effect have none there, the others the same."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import pytest

from latentrt.sampling import samplers
from latentrt.sampling.samplers import Steps
from tests.parity.sampling import diffusers_oracle as oracle
from tests.parity.sampling.test_samplers import TOLERANCE, compare_latents, compare_table, run_diffusers
from tests.runtime.sampling.sampler_grid import OPTIONS, STABLE_DIFFUSION, Case
from tests.runtime.sampling.test_sampler_keys import STEPS, candidates, equal, is_fixed, tabulate

# RePaint's betas are arrays in diffusers, which no file holds; the other has a test of its own below.
ELSEWHERE = {("repaint", "trained_betas"), ("euler", "timestep_type")}
LISTED = [(name, key) for name in OPTIONS for key in samplers.SAMPLERS[name].without_effect]


@pytest.mark.parametrize(("name", "key"), LISTED)
def test_a_key_listed_as_without_effect_has_none_in_diffusers(name: str, key: str) -> None:
    case = next(each for each in candidates(name, key) if tabulate(each, 5) is not None)
    rows, without = (
        run_unmodified(
            Case(name, {each: value for each, value in case.config.items() if each != left}, case.run_options)
        )
        for left in (None, key)
    )
    assert len(rows) == len(without) > 0
    for one, other in zip(rows, without, strict=True):
        np.testing.assert_array_equal(one, other)


def run_unmodified(case: Case) -> list[Any]:
    """Return diffusers' model inputs and latents, from latents far beyond any limit."""
    steps = case.steps(5)
    made = oracle.scheduler(samplers.find(case.name).class_name, case.config, steps, exact=False)
    return [array for row in run_diffusers(made, steps, np.float32(9), np.float32) for array in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_a_changed_key_changes_the_table_as_in_diffusers(name: str) -> None:
    sampler = samplers.SAMPLERS[name]
    hints = get_type_hints(sampler, include_extras=True)
    for key in (each.name for each in fields(sampler)):
        if is_fixed(hints[key]) or key in sampler.without_effect or (name, key) in ELSEWHERE:
            continue
        # 0 rows are compared where diffusers' own results are not finite, or its grid goes on to timestep −1.
        for count, case in ((count, case) for count in STEPS for case in candidates(name, key)):
            one, other = tabulate(case, count), tabulate(case, count, without=key)
            changed = one is not None and other is not None and not equal(one, other)
            if changed and (compare_table if case.linear else compare_latents)(case, count):
                break
        else:
            pytest.fail(f"no table with another {key} was compared")


def test_continuous_timesteps_change_the_table_as_in_diffusers() -> None:
    """They are ln(σ) / 4, below 0 for small σ, where the comparison of grids takes them for a rounding error."""
    config = {**STABLE_DIFFUSION, "timestep_type": "continuous", "prediction_type": "v_prediction"}
    schedule, steps = samplers.schedule("euler", config, 6), Steps(count=6)
    made = oracle.scheduler("EulerDiscreteScheduler", config, steps, exact=True)
    np.testing.assert_allclose(schedule.t, made.timesteps, rtol=1e-6, atol=1e-7)  # theirs are float32
    assert schedule.t.min() < 0
    for ours, theirs in oracle.compare(schedule, made, steps, exact=True):
        assert np.max(np.abs(ours - theirs)) <= TOLERANCE * np.max(np.abs(theirs))

"""Every key of every scheduler's configuration changes the sampler's table, or is listed as without effect.

That tables with changed keys equal diffusers' is tested in tests/parity/sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.schedule import Schedule
from tests.runtime.sampling.sampler_grid import DYNAMIC, FLOW, OPTIONS, STABLE_DIFFUSION, Case, cases, combine

# Some keys need a number of steps that is even, or more than a multiple of another.
STEPS = (5, 6, 3)
# Values of keys that the grid of options has no other value of, each with what it needs beside it.
MORE: dict[str, dict[str, Any]] = {
    "num_train_timesteps": {"num_train_timesteps": 900},
    "beta_start": {"beta_start": 0.0005},
    "beta_end": {"beta_end": 0.015},
    "trained_betas": {"num_train_timesteps": 50, "trained_betas": [0.001 + 0.0001 * i for i in range(50)]},
    "euler_at_final": {"euler_at_final": True, "lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "s_churn": {"s_churn": 1.0},
    "s_min": {"s_min": 5.0},
    "time_shift_type": FLOW | DYNAMIC | {"time_shift_type": "linear"},
    "timestep_spacing": {"timestep_spacing": "trailing"},
    "steps_offset": {"steps_offset": 3},
    "set_alpha_to_one": {"set_alpha_to_one": False},
    "clip_sample": {"clip_sample": True},
    "clip_sample_range": {"clip_sample": True, "clip_sample_range": 2.0},
    "thresholding": {"thresholding": True},
    "dynamic_thresholding_ratio": {"thresholding": True, "dynamic_thresholding_ratio": 0.9},
    "sample_max_value": {"thresholding": True, "sample_max_value": 1.6},
    "variance_type": {"variance_type": "fixed_large"},
    "upscale_mode": {"upscale_mode": "nearest"},
    "base_shift": DYNAMIC | {"base_shift": 0.3},
    "max_shift": DYNAMIC | {"max_shift": 0.9},
    "base_image_seq_len": DYNAMIC | {"base_image_seq_len": 100},
    "max_image_seq_len": DYNAMIC | {"max_image_seq_len": 500},
    "snr": {"snr": 0.3},
    "correct_steps": {"correct_steps": 2},
    "solver_type": {"solver_type": "midpoint"},
    "algorithm_type": {"algorithm_type": "dpmsolver++"},
}


def candidates(name: str, key: str) -> Iterator[Case]:
    """Yield cases in which a key has another value than its default."""
    sampler = samplers.SAMPLERS[name]
    default, known = getattr(sampler, key, None), {each.name for each in fields(sampler)} | sampler.run_options
    for setting in ({**STABLE_DIFFUSION, **MORE[key]}, MORE[key]) if key in MORE else ():
        yield combine(name, {each: value for each, value in setting.items() if each in known})
    if key in sampler.without_effect and key in MORE:
        yield combine(name, {key: MORE[key][key]})
    yield from (case for case in cases(name) if key in case.config and case.config[key] != default)


def tabulate(case: Case, count: int, *, without: str = "") -> Schedule | None:
    """Return the table of a case, also without one key of its configuration; None where it is refused."""
    config = {key: value for key, value in case.config.items() if key != without}
    options = dict(case.run_options)
    if without == "use_dynamic_shifting":
        options.pop("mu", None)
    try:
        return samplers.schedule(case.name, config, Case(case.name, config, options).steps(count))
    except RequestError:
        return None


def equal(one: Schedule, other: Schedule) -> bool:
    return all(np.array_equal(getattr(one, each.name), getattr(other, each.name)) for each in fields(Schedule))


def is_fixed(hint: Any) -> bool:
    """Return whether a key's type has a single value, so that every other is refused."""
    return hint is type(None) or (get_origin(hint) is Literal and len(get_args(hint)) == 1)


@pytest.mark.parametrize("name", [*OPTIONS, "vq_diffusion"])
def test_every_key_has_an_effect_or_is_listed_or_refused(name: str) -> None:
    sampler = samplers.SAMPLERS[name]
    hints = get_type_hints(sampler, include_extras=True)
    assert {*sampler.without_effect} <= {*hints}
    if name == "vq_diffusion":
        return  # it has no table; its keys are those of `posterior`, in tests/parity
    for key in (each.name for each in fields(sampler)):
        if is_fixed(hints[key]):
            with pytest.raises(RequestError) as refusal:
                sampler.read({key: "another"})
            assert f"`{key}`" in str(refusal.value)
            continue
        pairs = (
            (tabulate(case, count), tabulate(case, count, without=key))
            for count in STEPS
            for case in candidates(name, key)
        )
        differences = (not equal(one, other) for one, other in pairs if one is not None and other is not None)
        if key in sampler.without_effect:
            found = list(differences)
            assert found and not any(found), f"{key} has an effect, or no value of it was tried"  # noqa: PT018
        else:
            assert any(differences), f"{key} has no effect"

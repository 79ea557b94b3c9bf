"""Every sampler's table against the diffusers scheduler of the same configuration.

To add a sampler, add its options to `sampler_values.OPTIONS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers import Steps
from latentrt.sampling.schedule import Latents, Recurrence, Schedule
from latentrt.sampling.sigmas import RESPACED
from tests.runtime.sampling import diffusers_oddities as oddities
from tests.runtime.sampling import diffusers_oracle as oracle
from tests.runtime.sampling.sampler_grid import Case, cases
from tests.runtime.sampling.sampler_refusals import STRICTER, refused
from tests.runtime.sampling.sampler_values import OPTIONS, STABLE_DIFFUSION

# scheduler_config.json of Stable Diffusion 1.5 as it stands on disk.
ON_DISK = STABLE_DIFFUSION | {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
# Those that have their numbers from such a configuration.
TRAINED = [name for name in OPTIONS if hasattr(samplers.SAMPLERS[name], "beta_start")]
ORDINARY = [name for name in TRAINED if "inverse" not in name and name != "repaint"]

# Against the row's largest coefficient, both sides in float64 and accumulated from the first row on.
TOLERANCE = 1e-5
# The same of order 3 in hundreds of steps: diffusers' closed forms are differences of nearly equal logarithms, over
# products of such differences. Measured: 1.1e-5, of DEIS where 999 beta levels crowd at the ends.
MANY_OF_ORDER_3 = 3e-5
# SA-Solver's of order 4 lose all but this where levels crowd; ours are held to fifty digits in test_lagrange.py.
MANY_OF_ORDER_4 = 5e-2
# Levels are diffusers' to the bit but where a beta grid's fall between two float32 numbers: a unit in the last place.
LEVELS = {True: 1.3e-7, False: 1e-12}


def ours(case: Case, steps: Steps) -> Schedule:
    return samplers.schedule(case.name, case.config, steps)


def theirs(case: Case, steps: Steps, *, exact: bool) -> Any:
    return oracle.scheduler(samplers.find(case.name).class_name, case.config, steps, exact=exact)


def accepted(case: Case, count: int) -> tuple[Steps, Schedule, Any] | None:
    """Both sides of a combination; None where both refuse it, or we do where diffusers goes wrong."""
    refusal = ""
    try:
        steps = case.steps(count)
        schedule = ours(case, steps)
    except RequestError as error:
        refusal = str(error)
    if not refusal:
        return steps, schedule, theirs(case, steps, exact=True)
    if not any(reason in refusal for reason in STRICTER):
        assert refuses(case, count), f"{case}, {count} steps: only we refuse it: {refusal}"
    return None


def refuses(case: Case, count: int) -> bool:
    """Whether diffusers raises something, or makes numbers that are none."""
    try:
        steps = case.steps(count)
        rows = list(oracle.theirs(theirs(case, steps, exact=True), steps))
    except Exception:
        return True
    return not all(np.all(np.isfinite(after)) for _, after in rows)


def assert_equals_diffusers(case: Case, count: int) -> None:
    found = accepted(case, count)
    if found is None:
        return
    steps, schedule, made = found
    told = np.asarray(oracle.told(made, steps), np.float64)
    if min(told) < 0 and samplers.find(case.name).kind == "diffusion":
        return  # see test_trailing_spacing_stops_before_timestep_minus_one
    if case.name != "karras_ve":
        # Interpolated ones are float32 of values up to 1000.
        np.testing.assert_allclose(schedule.t, told, rtol=0, atol=6e-4)
    assert_same_start(schedule, made, steps, beta="use_beta_sigmas" in case.config)
    tolerance = tolerance_of(case, len(schedule))
    if case.linear:
        for i, (row, expected) in enumerate(oracle.beside(schedule, made, steps, exact=True)):
            if not np.all(np.isfinite(expected)):
                return  # each has a test in test_sampler_exceptions.py
            error = np.max(np.abs(row - expected)) / (np.max(np.abs(expected)) or 1)
            assert error <= tolerance, f"row {i // 2} of {case}, {count} steps: {error}"
    assert_places_clean_latents(case, schedule, made, steps)


def tolerance_of(case: Case, rows: int) -> float:
    """What diffusers' closed forms leave of a high order in a long table."""
    order = max(case.config.get(f"{kind}_order", 0) for kind in ("solver", "predictor", "corrector"))
    return TOLERANCE if rows <= 100 or order < 3 else MANY_OF_ORDER_3 if order == 3 else MANY_OF_ORDER_4


def assert_places_clean_latents(case: Case, schedule: Schedule, made: Any, steps: Steps) -> None:
    spread = any(case.config.get(key) for key in ("use_flow_sigmas", *(f"use_{each}_sigmas" for each in RESPACED)))
    if case.name == "sa_solver" and spread:
        return  # see test_sa_solver_places_latents_on_its_own_levels
    order = getattr(made, "order", 1)
    for k in {0, len(schedule) // 2, len(schedule) - 1}:
        expected = oddities.noised(made, steps.begin * order + k, 0.6, -1.3)
        if expected is not None:
            # Float32 levels, squared and summed.
            assert schedule.alpha[k] * 0.6 - schedule.sigma[k] * 1.3 == pytest.approx(expected, rel=1e-5, abs=1e-5), (
                case,
                k,
            )


def assert_same_start(schedule: Schedule, made: Any, steps: Steps, *, beta: bool) -> None:
    start = getattr(made, "init_noise_sigma", 1.0)
    if not steps.begin:
        # Float32 rounding, at zero SNR of values that went through a dozen of them.
        assert schedule.init_noise_sigma == pytest.approx(float(start), rel=1e-6)
    levels = oddities.levels(made, len(schedule), steps.begin)
    if levels is not None:
        with np.errstate(divide="ignore"):  # zero SNR, and the pure noise that a flow begins with
            found = schedule.sigma / schedule.alpha
        np.testing.assert_allclose(found, levels, rtol=LEVELS[beta])


SHAPE = (2, 4, 3, 5)
# Float32 on our side alone, which a model that is not linear carries on.
ROUNDING = 5e-5


def nonlinear(shown: Latents) -> Latents:
    return (np.tanh(shown[:, ::-1]) + np.clip(shown, -3, 3) / 2).astype(shown.dtype)


def assert_latents_equal_diffusers(case: Case, count: int) -> None:
    """Real noise and a model that is not linear; x0 is limited where there is such an option."""
    found = accepted(case, count)
    if found is None:
        return
    steps, schedule, made = found
    if min(np.asarray(oracle.told(made, steps), np.float64)) < 0 and samplers.find(case.name).kind == "diffusion":
        return
    scale = np.float32(np.hypot(schedule.alpha[0], schedule.sigma[0]) if steps.begin else schedule.init_noise_sigma)
    expected = [after for _, after in stepped(made, steps, scale, np.float64)]
    if not all(np.all(np.isfinite(after)) for after in expected):
        return  # each has a test in test_sampler_exceptions.py
    truth = largest_difference(denoised(schedule, scale, exactly=True), expected)
    # Of a quantile's float32, where there is one.
    assert truth <= 1e-6, f"{case}, {count} steps: {truth} in float64"
    rounded = largest_difference(denoised(schedule, scale, exactly=False), expected)
    if rounded > ROUNDING:
        # Where the signal is very weak, float32 has no more to give: diffusers' own loses as much.
        own = [after for _, after in stepped(theirs(case, steps, exact=False), steps, scale, np.float32)]
        # And where remembered values have large weights, those cancel, which diffusers computes in another order.
        lost = max(2 * largest_difference(own, expected), min(2**-20 * np.max(np.abs(schedule.b)), 1e-3))
        assert rounded <= lost, f"{case}, {count} steps: {rounded}, diffusers {lost}"


def largest_difference(found: list[Any], expected: list[Any]) -> float:
    """Of the largest value, in whichever row."""
    return max(float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1)) for a, b in zip(found, expected, strict=True))


def denoised(schedule: Schedule, scale: np.float32, *, exactly: bool) -> list[Any]:
    """The latents after each row, in float64 or as the pipeline does it."""
    generator, dtype = Generator(3), np.float64 if exactly else np.float32
    x: Any = (generator.normal(SHAPE) * scale).astype(dtype)
    recurrence: Any = oracle.Exactly(schedule) if exactly else Recurrence(schedule)
    rows = []
    for k in range(len(schedule)):
        output, z = nonlinear(recurrence.scale(k, x)), None
        for _ in range(schedule.noise_draws[k]):
            z = generator.normal(SHAPE).astype(dtype)
        x = recurrence.step(k, x, output, z)
        rows.append(x)
    return rows


def stepped(made: Any, steps: Steps, scale: np.float32, dtype: Any) -> Iterator[tuple[Any, Any]]:
    """diffusers' run on the same noise, in a precision."""
    generator = Generator(3)
    start = (generator.normal(SHAPE) * scale).astype(dtype)
    return oracle.run(
        made, start, lambda _, shown: nonlinear(shown), lambda: generator.normal(SHAPE).astype(dtype), steps
    )


def test_every_sampler_is_compared() -> None:
    assert OPTIONS.keys() == samplers.SAMPLERS.keys() - {"vq_diffusion"}  # which has a test of its own


def test_the_grid_is_large_and_mostly_accepted() -> None:
    made = {name: cases(name) for name in OPTIONS}
    assert sum(len(each) for each in made.values()) >= 1000
    for name, each in made.items():
        taken = 0
        for case in each:
            try:
                ours(case, case.steps(10))
                taken += 1
            except RequestError:
                pass
        assert taken >= len(each) // 2, name


@pytest.mark.parametrize("name", OPTIONS)
def test_what_diffusers_refuses_is_refused_in_words(name: str) -> None:
    for case in refused(name):
        with pytest.raises(RequestError, match=r"found|says") as refusal:
            ours(case, case.steps(10))
        assert refuses(case, 10) or any(reason in str(refusal.value) for reason in STRICTER), case


every = pytest.mark.parametrize("name", OPTIONS)
COUNTS = [1, 2, 3, 4, 10, 25, 50]


@every
def test_table_equals_diffusers(name: str) -> None:
    """One number of steps for each combination, each in turn; diffusers takes half a second to make a DPM2."""
    for i, case in enumerate(cases(name)[: 4 if name.startswith("dpm2") else 14]):
        assert_equals_diffusers(case, COUNTS[i % len(COUNTS)])


@every
def test_latents_equal_diffusers(name: str) -> None:
    limited = [case for case in cases(name) if not case.linear]
    for case in [*limited[:3], *cases(name)[:3]]:
        assert_latents_equal_diffusers(case, 6)


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
@every
def test_table_equals_diffusers_on_the_whole_grid(name: str, count: int) -> None:
    for case in cases(name):
        assert_equals_diffusers(case, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [999])
@every
def test_long_tables_equal_diffusers_row_by_row(name: str, count: int) -> None:
    for case in cases(name):
        assert_equals_diffusers(case, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 12])
@every
def test_latents_equal_diffusers_on_the_whole_grid(name: str, count: int) -> None:
    for case in cases(name):
        assert_latents_equal_diffusers(case, count)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ORDINARY)
def test_stable_diffusion_equals_diffusers_as_it_is(name: str, prediction_type: str) -> None:
    """With its own float32, and the configuration as it stands on disk for another scheduler."""
    config = ON_DISK | {"prediction_type": prediction_type}
    made = oracle.scheduler(samplers.find(name).class_name, config, 25, exact=False)
    schedule = samplers.schedule(name, config, 25)
    # diffusers' timesteps between those of training are interpolated between σ that are a place off here and there.
    np.testing.assert_allclose(schedule.t, made.timesteps.numpy(), rtol=0, atol=6e-4)
    for found, expected in oracle.beside(schedule, made):
        assert np.max(np.abs(found - expected)) <= TOLERANCE * np.max(np.abs(expected))

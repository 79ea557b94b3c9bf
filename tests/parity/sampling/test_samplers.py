"""Every sampler's table against the diffusers scheduler of the same configuration.

To add a sampler, add its options to `OPTIONS` in tests/runtime/sampling/sampler_grid.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers import Steps
from latentrt.sampling.schedule import Latents, Recurrence, Schedule
from latentrt.sampling.sigmas import SIGMA_SPACINGS
from tests.parity.sampling import diffusers_oracle as oracle
from tests.runtime.sampling.sampler_grid import ON_DISK, OPTIONS, ORDINARY, TRAINED, Case, cases
from tests.runtime.sampling.sampler_refusals import REFUSED, refused

# Of the largest coefficient so far of the same kind (of initial latents, model outputs or noise), both sides in float64
# and accumulated from the first row on.
TOLERANCE = 1e-5
# Where terms cancel, diffusers keeps the float64 rounding of the terms, of the largest coefficient of any kind.
CANCELLATION = 2.0**-50
# Sigmas are diffusers' to the bit, except beta sigmas between two float32 numbers: a unit in the last place.
SIGMA_TOLERANCE = {"beta": 1.3e-7, "": 1e-12}

# Fragments of errors that we raise and diffusers does not: it continues to NaN, or ignores an option.
STRICTER = (
    "does not determine x0",
    "does not determine epsilon",
    "two steps have the same sigma",
    "the grid includes the first and the last timestep",
    "`variance_type`='fixed_large_log', which is not supported with DDPM",
    "`variance_type`='learned'",
    "`variance_type`='fixed_small', which is not supported with UnCLIP",
    "'sde-dpmsolver++', which is not supported with DPMSolverMultistepInverse",
    "`use_flow_sigmas` and `use_",
    "`use_lu_lambdas` and `use_",
    "`timesteps` and `use_flow_sigmas`",
    "`sigmas` and `use_",
    "a last sigma of zero",
    "no table of finite numbers",
    "`shift_terminal` with a single step",
    "got `mu`",
    "in which sigma rises",
    "the highest and the lowest sigma",
    "but training has only up to",
    "(`num_inference_steps`), expected at most",
    "(`num_inference_steps`), but PNDM",
    "a step is at timestep",
    "got `begin`",
    "`trained_betas`, expected",
    "between `s_min` and `s_max`",
    "`solver_order`=4",
)


def build(case: Case, steps: Steps) -> Schedule:
    return samplers.schedule(case.name, case.config, steps)


def build_diffusers(case: Case, steps: Steps, *, exact: bool) -> Any:
    return oracle.scheduler(samplers.find(case.name).class_name, case.config, steps, exact=exact)


def build_both(case: Case, count: int) -> tuple[Steps, Schedule, Any] | None:
    """Return both sides of a case; None where both raise, or we do where diffusers is wrong."""
    refusal = ""
    try:
        steps = case.steps(count)
        schedule = build(case, steps)
    except RequestError as error:
        refusal = str(error)
    if not refusal:
        return steps, schedule, build_diffusers(case, steps, exact=True)
    if not any(reason in refusal for reason in STRICTER):
        assert diffusers_refuses(case, count), f"{case}, {count} steps: only we raise: {refusal}"
    return None


def diffusers_refuses(case: Case, count: int) -> bool:
    """Return whether diffusers raises an error, or computes NaN or infinity."""
    try:
        steps = case.steps(count)
        rows = list(oracle.coefficients(build_diffusers(case, steps, exact=True), steps))
    except Exception:
        return True
    return not all(np.all(np.isfinite(after)) for _, after in rows)


def compare_table(case: Case, count: int) -> int:
    """Compare the table of a case with diffusers'; return the number of rows whose coefficients were compared."""
    both = build_both(case, count)
    if both is None:
        return 0
    steps, schedule, made = both
    if case.name == "karras_ve":
        t = np.array(oracle.karras_ve_timesteps(made))
    else:
        t = np.asarray(oracle.timesteps(made, steps), np.float64)
    if min(t) < 0 and samplers.find(case.name).kind == "diffusion":
        return 0  # see test_trailing_spacing_stops_before_timestep_minus_one
    # Interpolated ones are float32 of values up to 1000.
    np.testing.assert_allclose(schedule.t, t, rtol=1e-6 if case.name == "karras_ve" else 0, atol=6e-4)
    compare_noise_levels(schedule, made, steps, spacing="beta" if "use_beta_sigmas" in case.config else "")
    rows = compare_coefficients(case, count, schedule, made, steps) if case.linear else 0
    compare_noised_latents(case, schedule, made, steps)  # last, as it moves diffusers' step index
    return rows


def compare_coefficients(case: Case, count: int, schedule: Schedule, made: Any, steps: Steps) -> int:
    """Compare rows until one is not finite in diffusers, each of which has a test in test_sampler_exceptions.py."""
    tolerance, crowded, rows = tolerance_of(case, schedule), rounding_where_crowded(case, schedule), len(schedule)
    kinds = {"latents": slice(0, 1), "outputs": slice(1, rows + 1), "noise": slice(rows + 1, None)}
    largest = 0.0  # of all kinds
    scales = [dict.fromkeys(kinds, 0.0), dict.fromkeys(kinds, 0.0)]  # of model inputs and of latents
    for i, (ours, theirs) in enumerate(oracle.compare(schedule, made, steps, exact=True)):
        if not np.all(np.isfinite(theirs)):
            return i // 2
        largest = max(largest, float(np.max(np.abs(theirs))))
        for kind, place in kinds.items():
            scale = scales[i % 2][kind] = max(scales[i % 2][kind], float(np.max(np.abs(theirs[..., place]))))
            error = np.max(np.abs((ours - theirs)[..., place]))
            assert error <= tolerance * scale + crowded[i // 2] + CANCELLATION * largest, (
                f"{kind} in row {i // 2} of {case}, {count} steps: {error} of {scale}"
            )
    return rows


def tolerance_of(case: Case, schedule: Schedule) -> float:
    """Return the tolerance relative to the largest coefficient so far, without what crowded sigmas lose."""
    if case.name == "dpm2_a" and len(schedule) > 1:
        # Its σ_down is the root of a difference of squares, which loses (σ / σ')² units of float64.
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = schedule.sigma[:-1] / schedule.sigma[1:]
        return max(TOLERANCE, 2.0**-52 * float(np.max(ratios[np.isfinite(ratios)], initial=0)) ** 2)
    return TOLERANCE


def rounding_where_crowded(case: Case, schedule: Schedule) -> NDArray[np.float64]:
    """Return the rounding of diffusers' closed forms of multistep and singlestep methods up to each row, [N].

    Those of order p are differences of terms in λ^(p − 1), divided by p − 1 short steps in λ. Of 999 beta sigmas,
    DEIS of order 3 keeps one digit and SA-Solver of order 4 none, so that nothing is compared there; test_multistep.py
    compares ours with 50 digits.
    """
    order = max(case.config.get(f"{kind}_order", 1) for kind in ("solver", "predictor", "corrector"))
    if order == 1:
        return np.zeros(len(schedule))
    with np.errstate(all="ignore"):
        log_snr = np.log(schedule.alpha / schedule.sigma)
        h = np.abs(np.diff(log_snr, append=np.inf))
        first_order = np.abs(np.sum(schedule.b, axis=1)) / h  # α or σ, by what the method's history holds
        history = np.maximum(np.abs(schedule.p), np.abs(schedule.q))
        # Sixteen roundings, of terms and of their sum.
        lost = 2.0**-48 * first_order * history * (np.maximum(1, np.abs(log_snr)) / h) ** (order - 1)
    lost = np.where(np.isfinite(lost), lost, 0.0)
    for k in range(1, len(lost)):  # what earlier rows lost is in the latents, whose signal grows
        growth = schedule.alpha[k] / schedule.alpha[k - 1] if schedule.alpha[k - 1] else 1.0
        lost[k] += lost[k - 1] * max(growth, abs(schedule.a[k] + schedule.e[k]))
    return lost


def compare_noised_latents(case: Case, schedule: Schedule, made: Any, steps: Steps) -> None:
    spaced = any(case.config.get(f"use_{each}_sigmas") for each in ("flow", *SIGMA_SPACINGS))
    if case.name == "sa_solver" and spaced:
        return  # see test_sa_solver_noises_latents_to_its_own_sigmas
    order = getattr(made, "order", 1)
    for k in {0, len(schedule) // 2, len(schedule) - 1}:
        expected = oracle.add_noise(made, steps.begin * order + k, 0.6, -1.3)
        if expected is not None:
            # Float32 constants, squared and summed.
            latents = schedule.alpha[k] * 0.6 - schedule.sigma[k] * 1.3
            assert latents == pytest.approx(expected, rel=1e-5, abs=1e-5), (case, k)


def compare_noise_levels(schedule: Schedule, made: Any, steps: Steps, *, spacing: str) -> None:
    start = getattr(made, "init_noise_sigma", 1.0)
    if not steps.begin:
        # Float32 rounding, at zero SNR of values that went through a dozen of them.
        assert schedule.init_noise_sigma == pytest.approx(float(start), rel=1e-6)
    sigmas = oracle.sigmas(made, len(schedule), steps.begin)
    if sigmas is not None:
        with np.errstate(divide="ignore"):  # zero SNR, and the pure noise that a flow begins with
            ours = schedule.sigma / schedule.alpha
        np.testing.assert_allclose(ours, sigmas, rtol=sigma_tolerance(made, spacing))


def sigma_tolerance(made: Any, spacing: str) -> float:
    name = type(made).__name__
    if name in ("ScoreSdeVpScheduler", "KarrasVeScheduler", "IPNDMScheduler"):
        return 1e-6  # of float32 arithmetic between the constants and the step
    if name == "KDPM2AncestralDiscreteScheduler":
        return 5e-4  # its σ_down is the root of a difference of squares, which loses (σ / σ')² units of float64
    return SIGMA_TOLERANCE[spacing]


SHAPE = (2, 4, 3, 5)
# Float32 on our side alone, which a nonlinear model propagates.
ROUNDING = 5e-5
# Of the largest latent: where diffusers' own float32 is so far from float64, any rounding leads to another image. Of
# all cases, some of RePaint with 100 rows at a signal of 0.015.
DIVERGED = 0.1


def nonlinear(shown: Latents) -> Latents:
    return (np.tanh(shown[:, ::-1]) + np.clip(shown, -3, 3) / 2).astype(shown.dtype)


def compare_latents(case: Case, count: int) -> bool:
    """Compare runs on real noise with a nonlinear model; x0 is limited where there is such an option."""
    both = build_both(case, count)
    if both is None:
        return False
    steps, schedule, made = both
    if min(np.asarray(oracle.timesteps(made, steps), np.float64)) < 0 and samplers.find(case.name).kind == "diffusion":
        return False
    scale = np.float32(np.hypot(schedule.alpha[0], schedule.sigma[0]) if steps.begin else schedule.init_noise_sigma)
    expected = [after for _, after in run_diffusers(made, steps, scale, np.float64)]
    if not all(np.all(np.isfinite(after)) for after in expected):
        return False  # each has a test in test_sampler_exceptions.py
    truth = largest_difference(run(schedule, scale, np.float64), expected)
    # Of a quantile's float32, where there is one.
    assert truth <= 1e-6, f"{case}, {count} steps: {truth} in float64"
    rounded = largest_difference(run(schedule, scale, np.float32), expected)
    if rounded > ROUNDING:
        # Where the signal is very weak, float32 cannot do better: diffusers' own error is as large.
        own = [after for _, after in run_diffusers(build_diffusers(case, steps, exact=False), steps, scale, np.float32)]
        # And where a history has large weights, those cancel, which diffusers computes in another order.
        own_error = largest_difference(own, expected)
        lost = max(2 * own_error, min(2**-20 * np.max(np.abs(schedule.b)), 1e-3))
        assert rounded <= lost or own_error > DIVERGED, f"{case}, {count} steps: {rounded}, diffusers {lost}"
    return True


def largest_difference(ours: list[Any], theirs: list[Any]) -> float:
    """Return the largest difference relative to the largest value of its row."""
    return max(float(np.max(np.abs(a - b)) / (np.max(np.abs(b)) or 1)) for a, b in zip(ours, theirs, strict=True))


def run(schedule: Schedule, scale: np.float32, dtype: Any) -> list[Any]:
    """Return the latents after each row."""
    generator, recurrence = Generator(3), Recurrence(schedule, dtype)
    x: Any = (generator.normal(SHAPE) * scale).astype(dtype)
    rows = []
    for k in range(len(schedule)):
        output, z = nonlinear(recurrence.model_input(k, x)), None
        for _ in range(schedule.noise_draws[k]):
            z = generator.normal(SHAPE).astype(dtype)
        x = recurrence.step(k, x, output, z)
        rows.append(x)
    return rows


def run_diffusers(made: Any, steps: Steps, scale: np.float32, dtype: Any) -> Iterator[tuple[Any, Any]]:
    """Yield diffusers' model inputs and latents with the same noise."""
    generator = Generator(3)
    start = (generator.normal(SHAPE) * scale).astype(dtype)
    return oracle.run(made, start, lambda _, x: nonlinear(x), lambda: generator.normal(SHAPE).astype(dtype), steps)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options_fail_in_diffusers_too(name: str) -> None:
    for case in refused(name):
        with pytest.raises(RequestError) as refusal:
            build(case, case.steps(10))
        assert diffusers_refuses(case, 10) or any(reason in str(refusal.value) for reason in STRICTER), case


every = pytest.mark.parametrize("name", OPTIONS)
COUNTS = [1, 2, 3, 4, 10, 25, 50]


@every
def test_table_equals_diffusers(name: str) -> None:
    """One number of steps for each case, each in turn; diffusers takes half a second to make a DPM2."""
    some = cases(name)[: 4 if name.startswith("dpm2") else 14]
    assert sum(compare_table(case, COUNTS[i % len(COUNTS)]) for i, case in enumerate(some)) >= 10


@every
def test_latents_equal_diffusers(name: str) -> None:
    limited = [case for case in cases(name) if not case.linear]
    assert sum(compare_latents(case, 6) for case in [*limited[:3], *cases(name)[:3]]) >= 1


@every
def test_a_changed_coefficient_is_found(name: str) -> None:
    """The comparison itself fails once any column in use is off by a tenth of a per cent."""
    whole = (case for case in cases(name) if case.linear and not case.run_options.get("begin"))
    case, count = next((case, count) for case in whole for count in (4, 5) if compare_table(case, count) > 1)
    schedule = build(case, case.steps(count))
    for column in ("t", "c_in", "p", "q", "u", "w", "a", "e", "d", "b", "s", "alpha", "sigma", "init_noise_sigma"):
        values = getattr(schedule, column)
        if np.any(values):
            changed = replace(schedule, **{column: values * 1.001})
            with mock.patch(f"{__name__}.build", lambda *_, changed=changed: changed), pytest.raises(AssertionError):
                compare_table(case, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [*COUNTS, 999])
@every
def test_table_equals_diffusers_on_the_whole_grid(name: str, count: int) -> None:
    for case in cases(name):
        compare_table(case, count)


@pytest.mark.slow
@pytest.mark.parametrize("count", [3, 12])
@every
def test_latents_equal_diffusers_on_the_whole_grid(name: str, count: int) -> None:
    for case in cases(name):
        compare_latents(case, count)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ORDINARY)
def test_stable_diffusion_equals_unmodified_diffusers(name: str, prediction_type: str) -> None:
    """In its own float32, with a configuration saved by another scheduler."""
    config = ON_DISK | {"prediction_type": prediction_type}
    made = oracle.scheduler(samplers.find(name).class_name, config, 25, exact=False)
    schedule = samplers.schedule(name, config, 25)
    # diffusers' fractional timesteps are interpolated between σ that are a unit in the last place off here and there.
    np.testing.assert_allclose(schedule.t, made.timesteps.numpy(), rtol=0, atol=6e-4)
    for ours, theirs in oracle.compare(schedule, made):
        assert np.max(np.abs(ours - theirs)) <= TOLERANCE * np.max(np.abs(theirs))


@pytest.mark.parametrize("name", [each for each in ORDINARY if each != "unclip"])
def test_clean_latents_are_noised_as_in_unmodified_diffusers(name: str) -> None:
    made = oracle.scheduler(samplers.find(name).class_name, ON_DISK, 10, exact=False)
    schedule = samplers.schedule(name, ON_DISK, 10)
    clean, noise = np.float32(0.6), np.float32(-1.3)
    for k, t in enumerate(made.timesteps):
        if getattr(made, "order", 1) == 2 and k % 2:
            continue  # no run begins at a second stage
        if hasattr(made, "set_begin_index"):
            made.set_begin_index(k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = made.add_noise(torch.tensor([clean]), torch.tensor([noise]), t[None]).item()
        ours = schedule.alpha[k] * clean + schedule.sigma[k] * noise
        assert ours == pytest.approx(expected, rel=1e-6, abs=1e-6)  # float32 rounding


def test_trained_betas_are_used() -> None:
    betas = [0.01 + 0.0001 * i for i in range(100)]
    config = {"trained_betas": betas, "num_train_timesteps": 100, "clip_sample": False}
    for name in (each for each in TRAINED if each != "repaint"):  # in diffusers arrays only
        assert compare_table(Case(name, config, {}), 10)

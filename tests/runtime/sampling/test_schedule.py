from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from latentrt.errors import RequestError
from latentrt.sampling import samplers
from latentrt.sampling.samplers import SAMPLERS
from latentrt.sampling.schedule import Latents, Recurrence, Schedule, denoise
from latentrt.sampling.sigmas import training_sigmas
from latentrt.sampling.training_noise import training_alphas

SHAPE = (2, 4, 3, 5)


def table(rows: int = 3, **columns: Any) -> Schedule:
    """A schedule whose rows copy the latents, except for the columns given."""
    defaults: dict[str, Any] = {
        "t": np.arange(rows)[::-1],
        "p": 0.0,
        "q": 1.0,
        "a": 1.0,
        "b": np.zeros((rows, 1)),
        "alpha": 1.0,
        "sigma": 1.0,
    }
    return Schedule.of(**(defaults | columns))


def full(value: float) -> Latents:
    return np.full(SHAPE, value, np.float32)


def test_columns_are_arrays_of_their_types() -> None:
    schedule = table(3, b=np.zeros((3, 2)), noise_draws=1)
    assert len(schedule) == 3
    assert schedule.memory == 2
    assert schedule.t.dtype == np.float32
    assert schedule.noise_draws.tolist() == [1, 1, 1]
    assert schedule.limit.tolist() == [np.inf] * 3
    assert schedule.a.dtype == schedule.b.dtype == np.float64


def test_columns_are_read_only() -> None:
    with pytest.raises(ValueError, match="read-only"):
        table().a[0] = 2


@pytest.mark.parametrize("shape", [(2, 1), (3,), (3, 1, 1)], ids=str)
def test_columns_of_other_shapes_are_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"column b is a ndarray of shape .* 3 rows"):
        table(3, b=np.zeros(shape))


def test_columns_that_are_lists_are_rejected() -> None:
    with pytest.raises(ValueError, match="column p is a list"):
        replace(table(3), p=[0.0, 0.0, 0.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_coefficients_must_be_finite_float32(value: float) -> None:
    with pytest.raises(ValueError, match="column e"):
        table(e=value)


@pytest.mark.parametrize(("rows", "start"), [(0, 1.0), (3, np.inf), (3, np.nan)])
def test_a_schedule_has_rows_and_a_finite_start(rows: int, start: float) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows and init_noise_sigma={start}"):
        table(rows, init_noise_sigma=start)


def test_a_row_is_the_formula() -> None:
    """Every coefficient is a different power of two, so float32 sums are exact."""
    columns: dict[str, float] = {"p": 2, "q": 4, "limit": 5, "u": 8, "w": 16, "a": 0.5, "e": 0.25, "d": 32, "s": 64}
    b = np.array([[1.0, 0.0], [1.0, 128.0]])
    schedule = table(2, **columns | {"e": np.array([0, 0.25])}, b=b, c_in=0.125)
    recurrence = Recurrence(schedule)
    x0, m0, m1, z = full(1), full(0.5), full(-2), full(0.25)

    np.testing.assert_array_equal(recurrence.model_input(0, x0), 0.125 * x0)
    h0 = 8 * x0 + 16 * np.clip(2 * x0 + 4 * m0, -5, 5)
    x1 = 0.5 * x0 + 32 * m0 + h0 + 64 * z
    np.testing.assert_array_equal(recurrence.step(0, x0, m0, z), x1)

    h1 = 8 * x1 + 16 * np.clip(2 * x1 + 4 * m1, -5, 5)
    x2 = 0.5 * x1 + 0.25 * x0 + 32 * m1 + h1 + 128 * h0 + 64 * z
    np.testing.assert_array_equal(recurrence.step(1, x1, m1, z), x2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_precision_stays(dtype: Any) -> None:
    recurrence = Recurrence(table(c_in=1 / 3, a=1 / 3, b=np.full((3, 1), 1 / 3)), dtype)
    x = full(1).astype(dtype)
    assert recurrence.model_input(0, x).dtype == dtype
    assert recurrence.step(0, x, x).dtype == dtype


def test_a_zero_coefficient_skips_its_array() -> None:
    x = Recurrence(table(a=0.0, b=np.ones((3, 1)))).step(0, full(np.inf), full(3))
    np.testing.assert_array_equal(x, full(3))


def test_arguments_are_not_modified() -> None:
    recurrence = Recurrence(table(b=np.ones((3, 1))))
    x, m = full(1), full(2)
    recurrence.step(0, x, m)[:] = 9
    recurrence.model_input(1, x)[:] = 9
    assert np.all(x == 1)
    assert np.all(m == 2)


@pytest.mark.parametrize("columns", [{"e": 1.0}, {"b": np.ones((3, 2))}, {"s": 1.0}], ids=str)
def test_a_row_needs_its_inputs(columns: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not provided"):
        Recurrence(table(**columns)).step(0, full(1), full(1))


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)], ids=str)
def test_leading_axes_do_not_change_a_sample(leading: tuple[int, ...]) -> None:
    """Also under dynamic thresholding, whose quantile is that of the sample."""
    schedule = table(2, p=1.0, q=0.5, limit=3.0, quantile=0.9, b=np.full((2, 1), 0.5), e=np.array([0.0, 0.25]))
    rng = np.random.default_rng(0)
    x, m = rng.normal(size=(2, *leading, 4, 3, 5)).astype(np.float32) * 3
    whole = Recurrence(schedule)
    together = whole.step(1, whole.step(0, x, m), m)
    for place in np.ndindex(*leading):
        single = Recurrence(schedule)
        np.testing.assert_array_equal(single.step(1, single.step(0, x[place], m[place]), m[place]), together[place])


def test_dynamic_thresholding_clips_to_a_quantile_and_divides_by_it() -> None:
    """Saharia et al. 2022, section 2.3."""
    schedule = table(1, p=1.0, q=0.0, limit=3.0, quantile=0.75, a=0.0, b=np.ones((1, 1)))
    x: Latents = np.array([0.5, -1, 2, -2.5, 4], np.float32).reshape(1, 1, 5)  # |y| has the quantile 2.5
    expected = np.array([0.5, -1, 2, -2.5, 2.5], np.float32).reshape(1, 1, 5) / np.float32(2.5)
    np.testing.assert_array_equal(Recurrence(schedule).step(0, x, x), expected)
    large, small = x * np.float32(4), x / np.float32(8)
    np.testing.assert_array_equal(Recurrence(schedule).step(0, large, x), np.clip(large, -3, 3) / np.float32(3))
    np.testing.assert_array_equal(Recurrence(schedule).step(0, small, x), small)  # the limit is at least 1


def test_denoise_yields_every_row_and_consumes_the_noise_of_the_table() -> None:
    consumed, timesteps = [], []

    def noise() -> Latents:
        consumed.append(1)
        return full(1)

    def model(t: np.float32, x: Latents) -> Latents:
        timesteps.append(float(t))
        return x

    schedule = table(3, noise_draws=1, s=np.array([1.0, 1.0, 0.0]))
    after = [float(x.max()) for x in denoise(schedule, full(0), model, noise)]
    assert after == [1, 2, 2]
    assert timesteps == [2, 1, 0]
    assert len(consumed) == 3  # also for the row whose s is 0


def test_first_latents_are_noise_or_a_noised_image() -> None:
    schedule = table(3, alpha=np.array([0.5, 0.25, 2.0]), sigma=np.array([4.0, 2.0, 1.0]), init_noise_sigma=8.0)
    noise, clean = full(3), full(1)
    np.testing.assert_array_equal(schedule.first_latents(noise), full(24))
    np.testing.assert_array_equal(schedule.first_latents(noise, clean), full(12.5))
    np.testing.assert_array_equal(schedule.first_latents(noise, clean, row=1), full(6.25))
    np.testing.assert_array_equal(schedule.starting_at(1).first_latents(noise, clean), full(6.25))
    with pytest.raises(ValueError, match="row=1"):
        schedule.first_latents(noise, row=1)


def test_a_schedule_is_cut_by_rows() -> None:
    schedule = table(3, alpha=np.array([0.5, 0.25, 2.0]), init_noise_sigma=8.0)
    first, rest = schedule.ending_at(2), schedule.starting_at(2)
    assert (len(first), len(rest)) == (2, 1)
    for name in ("t", "alpha", "b"):
        parts = [getattr(each, name) for each in (first, rest)]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(schedule, name))
    assert first.init_noise_sigma == rest.init_noise_sigma == 8


def test_a_row_looks_back_by_its_history_and_previous_latents() -> None:
    b = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    schedule = table(4, b=b)
    assert [schedule.looks_back_beyond(row) for row in range(4)] == [False, True, False, True]
    schedule = table(4, e=np.array([0, 0, 0.5, 0]))
    assert [schedule.looks_back_beyond(row) for row in range(4)] == [False, False, True, False]


def test_rows_in_which_float32_cancels_are_rewritten() -> None:
    """Where a·x and the x in b·h nearly cancel: the same row in exact arithmetic, without its digits lost."""
    schedule = table(1, a=1000.0, p=-1.0, q=2.0, b=np.array([[999.0]]))
    assert (schedule.a[0], schedule.b[0, 0], schedule.d[0]) == (1.0, 0.0, 1998.0)
    limited = table(1, a=1000.0, p=-1.0, q=2.0, b=np.array([[999.0]]), limit=1.0)
    assert (limited.a[0], limited.b[0, 0], limited.d[0]) == (1000.0, 999.0, 0.0)


TRAINING = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
}


@pytest.mark.parametrize(
    "name",
    [name for name, each in SAMPLERS.items() if each.kind == "diffusion" and not each.inverse and name != "unclip"],
)
def test_c_noise_agrees_with_the_timestep(name: str) -> None:
    schedule = samplers.schedule(name, TRAINING, 12)
    sigma = training_sigmas(training_alphas(TRAINING)).astype(np.float64)
    expected = np.log(np.interp(schedule.t, np.arange(len(sigma)), sigma)) / 4
    # DPM2 and DPM++ SDE round the timesteps of their intermediate rows, 5.7e-5 seen.
    np.testing.assert_allclose(schedule.with_c_noise().t, expected, rtol=0, atol=1e-4)


def test_pure_noise_has_no_c_noise() -> None:
    schedule = samplers.schedule(
        "ddim", {**TRAINING, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 4
    )
    with pytest.raises(RequestError, match="rescale_betas_zero_snr"):
        schedule.with_c_noise()

"""The table and the loop body that runs it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt.sampling.schedule import Latents, Recurrence, Schedule, denoise

SHAPE = (2, 4, 3, 5)


def table(rows: int = 3, **columns: Any) -> Schedule:
    """A table whose rows copy the latent, but for the columns given."""
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


def test_a_table_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        table().a[0] = 2


@pytest.mark.parametrize("columns", [{"b": np.zeros((2, 1))}, {"b": np.zeros(3)}, {"b": np.zeros((3, 1, 1))}], ids=str)
def test_columns_of_other_lengths_are_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"column b: found shape .*, expected 3 rows and 2 axes"):
        table(3, **columns)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_coefficients_that_are_not_numbers_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"column e: .* expected finite float32 numbers"):
        table(e=value)


def test_a_row_is_the_formula() -> None:
    """Every coefficient a different power of two, so that float32 sums are exact."""
    columns: dict[str, float] = {"p": 2, "q": 4, "limit": 5, "u": 8, "w": 16, "a": 0.5, "e": 0.25, "d": 32, "s": 64}
    b = np.array([[1.0, 0.0], [1.0, 128.0]])
    schedule = table(2, **columns | {"e": np.array([0, 0.25])}, b=b, c_in=0.125)
    recurrence = Recurrence(schedule)
    x0, m0, m1, z = full(1), full(0.5), full(-2), full(0.25)

    np.testing.assert_array_equal(recurrence.scale(0, x0), 0.125 * x0)
    h0 = 8 * x0 + 16 * np.clip(2 * x0 + 4 * m0, -5, 5)
    x1 = 0.5 * x0 + 32 * m0 + h0 + 64 * z
    np.testing.assert_array_equal(recurrence.step(0, x0, m0, z), x1)

    h1 = 8 * x1 + 16 * np.clip(2 * x1 + 4 * m1, -5, 5)
    x2 = 0.5 * x1 + 0.25 * x0 + 32 * m1 + h1 + 128 * h0 + 64 * z
    np.testing.assert_array_equal(recurrence.step(1, x1, m1, z), x2)


def test_everything_stays_float32() -> None:
    schedule = table(c_in=1 / 3, a=1 / 3, b=np.full((3, 1), 1 / 3))
    recurrence = Recurrence(schedule)
    assert recurrence.scale(0, full(1)).dtype == np.float32
    assert recurrence.step(0, full(1), full(1)).dtype == np.float32


def test_a_zero_coefficient_makes_no_nan() -> None:
    schedule = table(a=0.0, b=np.ones((3, 1)))
    x = Recurrence(schedule).step(0, full(np.inf), full(3))
    np.testing.assert_array_equal(x, full(3))


def test_the_arrays_given_are_left_alone() -> None:
    recurrence = Recurrence(table(b=np.ones((3, 1))))
    x, m = full(1), full(2)
    recurrence.step(0, x, m)[:] = 9
    recurrence.scale(1, x)[:] = 9
    assert np.all(x == 1)
    assert np.all(m == 2)


@pytest.mark.parametrize("columns", [{"e": 1.0}, {"b": np.ones((3, 2))}, {"s": 1.0}], ids=str)
def test_a_row_that_lacks_what_it_uses_is_refused(columns: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="there is none"):
        Recurrence(table(**columns)).step(0, full(1), full(1))


def test_denoise_draws_what_the_table_says_and_yields_every_row() -> None:
    drawn, told = [], []

    def noise() -> Latents:
        drawn.append(1)
        return full(1)

    def model(t: np.float32, shown: Latents) -> Latents:
        told.append(float(t))
        return shown

    schedule = table(3, noise_draws=1, s=np.array([1.0, 1.0, 0.0]))
    after = [float(x.max()) for x in denoise(schedule, full(0), model, noise)]
    assert after == [1, 2, 2]
    assert told == [2, 1, 0]
    assert len(drawn) == 3  # also for the row whose s is 0


def test_first_latents_are_noise_or_a_noised_picture() -> None:
    schedule = table(3, alpha=np.array([0.5, 0.25, 2.0]), sigma=np.array([4.0, 2.0, 1.0]), init_noise_sigma=8.0)
    noise, clean = full(3), full(1)
    np.testing.assert_array_equal(schedule.first_latents(noise), full(24))
    np.testing.assert_array_equal(schedule.first_latents(noise, clean), full(12.5))
    np.testing.assert_array_equal(schedule.first_latents(noise, clean, row=1), full(6.25))
    np.testing.assert_array_equal(schedule.starting_at(1).first_latents(noise, clean), full(6.25))
    with pytest.raises(ValueError, match="found row 1 and no clean latents"):
        schedule.first_latents(noise, row=1)


def test_a_table_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"column s: found 1e\+39, expected finite float32 numbers"):
        table(s=1e39)

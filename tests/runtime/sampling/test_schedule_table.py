from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import numpy as np
import pytest

from latentrt.sampling import samplers
from latentrt.sampling.samplers import SAMPLERS
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.schedule_table import (
    active_columns,
    all_columns,
    format_csv,
    format_json,
    format_schedule,
    format_table,
)

ROW = ["t", "c_in", "p", "q", "limit", "u", "w", "a", "e", "d", "b", "s", "noise_draws"]
# The discrete one has no table.
TABLES = [name for name in SAMPLERS if name != "vq_diffusion"]


def table(name: str = "dpmpp_2m", steps: int = 7, **options: Any) -> Schedule:
    return samplers.schedule(name, {}, steps, options=options)


@pytest.mark.parametrize("name", TABLES)
def test_json_holds_every_number_exactly(name: str) -> None:
    made = table(name)
    read = json.loads(format_json(made))
    assert list(read) == ["init_noise_sigma", "rows"]
    assert read["init_noise_sigma"] == made.init_noise_sigma
    assert [list(row) for row in read["rows"]] == [ROW] * len(made)
    for key in ROW:
        found = [math.inf if row[key] is None else row[key] for row in read["rows"]]
        assert np.array_equal(np.array(found), getattr(made, key)), key


def test_json_has_no_infinity_and_a_quantile_only_with_thresholding() -> None:
    rows = json.loads(format_json(table()))["rows"]
    assert all(row["limit"] is None for row in rows)
    rows = json.loads(format_json(table(thresholding=True, sample_max_value=2)))["rows"]
    assert list(rows[0]) == [*ROW[:5], "quantile", *ROW[5:]]
    assert {(row["limit"], row["quantile"]) for row in rows} == {(2.0, 0.995)}


def test_json_of_rows_that_are_clipped_and_rows_that_are_not() -> None:
    ones = np.ones(2)
    made = Schedule.of(
        t=ones, a=1.0, b=np.ones((2, 1)), alpha=1.0, sigma=1.0, p=0.0, q=1.0, limit=np.array([0.5, np.inf])
    )
    assert [row["limit"] for row in json.loads(format_json(made))["rows"]] == [0.5, None]


@pytest.mark.parametrize("name", TABLES)
def test_csv_holds_every_number_exactly(name: str) -> None:
    made = table(name)
    rows = list(csv.DictReader(io.StringIO(format_csv(made), newline="")))
    history = [f"b{j}" for j in range(made.memory)]
    assert list(rows[0]) == [*ROW[:10], *history, *ROW[11:]]
    for key, column in all_columns(made).items():
        assert np.array_equal(np.array([float(row[key]) for row in rows]), column), key


def test_csv_has_inf_without_a_limit() -> None:
    assert {row["limit"] for row in csv.DictReader(io.StringIO(format_csv(table())))} == {"inf"}
    assert "quantile" in format_csv(table(thresholding=True)).splitlines()[0]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_aligned_and_lists_the_columns_it_omits(name: str) -> None:
    made = table(name)
    title, noise, empty, heading, *rows, gap, omitted = format_table(made, "the title").splitlines()
    assert (title, empty, gap) == ("the title", "", "")
    assert noise == f"init_noise_sigma {made.init_noise_sigma:.9g}"
    names = heading.split()
    assert names == ["row", "t", "sigma", *list(active_columns(made))[1:]]
    assert len(rows) == len(made)
    assert {len(row) for row in rows} == {len(heading)}
    for row, line in enumerate(rows):
        values = [float(cell) for cell in line.split()]
        sigma = made.sigma[row] / made.alpha[row] if made.alpha[row] else float("inf")
        timestep, *others = (column[row] for column in active_columns(made).values())
        assert values == pytest.approx([row, timestep, sigma, *others], rel=1e-5)
    idle = omitted.removeprefix("without effect in any row: ").split(", ")
    assert sorted(idle + [name for name in names[1:] if name != "sigma"]) == sorted(all_columns(made))


def test_columns_without_effect_are_not_active() -> None:
    idle = Schedule.of(t=np.zeros(2), a=0.0, b=np.zeros((2, 2)), alpha=1.0, sigma=1.0, p=0.0, q=0.0)
    assert list(active_columns(idle)) == ["t"]
    some = Schedule.of(
        t=np.zeros(2),
        a=np.array([0, 1e-9]),
        b=np.array([[0, 0, 0], [0, 0, 1.0]]),
        alpha=1.0,
        sigma=1.0,
        p=1.0,
        q=0.0,
        c_in=np.array([1, 1 - 1e-9]),
        limit=np.array([np.inf, 5]),
        w=0.0,
        noise_draws=np.array([0, 1]),
    )
    assert list(active_columns(some)) == ["t", "c_in", "p", "limit", "w", "a", "b2", "noise_draws"]
    assert list(active_columns(table())) == ["t", "p", "q", "a", "b0", "b1"]


def test_no_minus_before_zero() -> None:
    assert "-0.0" in format_json(table("ddim_inverse"))
    assert "-0" not in format_table(table("ddim_inverse", 1), "").split()


def test_a_format_by_its_name() -> None:
    made = table()
    assert format_schedule(made, "json", "x") == format_json(made)
    assert format_schedule(made, "csv", "x") == format_csv(made)
    assert format_schedule(made, "table", "x") == format_table(made, "x")

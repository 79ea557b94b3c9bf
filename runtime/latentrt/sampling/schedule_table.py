"""Schedules as text: a readable table, CSV and JSON.

The columns have the names of the formulas in `latentrt.sampling.schedule`. CSV and JSON have all digits; the table has
six, and omits columns without effect.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.schedule import Schedule

__all__ = ["Format", "active_columns", "all_columns", "format_csv", "format_json", "format_schedule", "format_table"]

Format = Literal["table", "csv", "json"]

Column = NDArray[np.generic]

_SINGLE = ("t", "c_in", "p", "q", "limit", "quantile", "u", "w", "a", "e", "d")
_LAST = ("s", "noise_draws")
# The value without effect; 0 in all other columns, which leaves their term out.
_NEUTRAL = {"c_in": 1.0, "w": 1.0, "limit": math.inf}


def all_columns(schedule: Schedule) -> dict[str, Column]:
    """Return every column by name, [N] each, with `b` as b0, b1, …; `quantile` only with dynamic thresholding."""
    names = [name for name in _SINGLE if name != "quantile" or np.any(schedule.quantile)]
    columns: dict[str, Column] = {name: getattr(schedule, name) for name in names}
    columns |= {f"b{j}": schedule.b[:, j] for j in range(schedule.memory)}
    return columns | {name: getattr(schedule, name) for name in _LAST}


def active_columns(schedule: Schedule) -> dict[str, Column]:
    """Return the columns that have an effect in some row, and the timestep."""
    return {
        name: column
        for name, column in all_columns(schedule).items()
        if name == "t" or np.any(column != _NEUTRAL.get(name, 0))
    }


def format_schedule(schedule: Schedule, form: Format, title: str) -> str:
    """Return the schedule in a format, with a newline at the end; only the table has the title."""
    writers: Mapping[Format, Callable[[], str]] = {
        "table": lambda: format_table(schedule, title),
        "csv": lambda: format_csv(schedule),
        "json": lambda: format_json(schedule),
    }
    return writers[form]()


def format_json(schedule: Schedule) -> str:
    """Return `{"init_noise_sigma": …, "rows": [{"t": …, "c_in": …, "b": […], …}]}`; an infinite `limit` is null."""
    names = [name for name in (*_SINGLE, "b", *_LAST) if name != "quantile" or np.any(schedule.quantile)]
    lists = {name: getattr(schedule, name).tolist() for name in names}
    lists["limit"] = [None if limit == math.inf else limit for limit in lists["limit"]]
    rows = (dict(zip(names, values, strict=True)) for values in zip(*lists.values(), strict=True))
    # One row per line, so that files can be read and compared by line.
    lines = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
    return f'{{\n  "init_noise_sigma": {json.dumps(schedule.init_noise_sigma)},\n  "rows": [\n{lines}\n  ]\n}}\n'


def format_csv(schedule: Schedule) -> str:
    """Return a line of names and a line for each row; an infinite `limit` is `inf`."""
    columns, text = all_columns(schedule), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
    return text.getvalue()


def format_table(schedule: Schedule, title: str) -> str:
    """Return a title, the columns that have an effect with the row's number and σ / α, and the names of the others."""
    active = active_columns(schedule)
    cells = [["row", *map(str, range(len(schedule)))]]
    cells += [[name, *map(_format_value, column.tolist())] for name, column in active.items()]
    with np.errstate(divide="ignore"):
        cells.insert(2, ["sigma", *map(_format_value, (schedule.sigma / schedule.alpha).tolist())])
    widths = [max(map(len, column)) for column in cells]
    lines = [title, f"init_noise_sigma {schedule.init_noise_sigma:.9g}", ""]
    lines += [_format_line(row, widths) for row in zip(*cells, strict=True)]
    if omitted := [name for name in all_columns(schedule) if name not in active]:
        lines += ["", f"without effect in any row: {', '.join(omitted)}"]
    return "\n".join(lines) + "\n"


def _format_line(row: Iterable[str], widths: list[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _format_value(value: Any) -> str:
    # + 0.0 turns −0 into 0.
    return f"{value + 0.0:.6g}" if isinstance(value, float) else str(value)

"""How is a sampler's table written down: for people, for a spreadsheet, for a program?

The columns have the names of the formulas in `latentrt.sampling.schedule`. CSV and JSON hold every digit of them; the
table for people holds six, and leaves out the columns that do nothing.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.schedule import Schedule

__all__ = ["FORMATS", "Format", "active", "as_csv", "as_json", "as_table", "columns", "written"]

Format = Literal["table", "csv", "json"]
FORMATS: tuple[Format, ...] = get_args(Format)

Column = NDArray[np.generic]

_SINGLE = ("t", "c_in", "p", "q", "limit", "quantile", "u", "w", "a", "e", "d")
_LAST = ("s", "noise_draws")
# What a column holds where it changes nothing; all others 0, which leaves a term out.
_IDLE = {"c_in": 1.0, "w": 1.0, "limit": math.inf}


def columns(schedule: Schedule) -> dict[str, Column]:
    """Every column by its name, [N] each, `b` as b0, b1, …; `quantile` only where a row has dynamic thresholding."""
    names = [name for name in _SINGLE if name != "quantile" or np.any(schedule.quantile)]
    found: dict[str, Column] = {name: getattr(schedule, name) for name in names}
    found |= {f"b{j}": schedule.b[:, j] for j in range(schedule.memory)}
    return found | {name: getattr(schedule, name) for name in _LAST}


def active(schedule: Schedule) -> dict[str, Column]:
    """Those of `columns` that do something in some row; the timestep always does."""
    return {name: column for name, column in columns(schedule).items() if name == "t" or _works(name, column)}


def _works(name: str, column: Column) -> bool:
    return bool(np.any(column != _IDLE.get(name, 0)))


def written(schedule: Schedule, form: Format, title: str) -> str:
    """The table in a format, with a newline at its end."""
    writers: Mapping[Format, Callable[[], str]] = {
        "table": lambda: as_table(schedule, title),
        "csv": lambda: as_csv(schedule),
        "json": lambda: as_json(schedule),
    }
    return writers[form]()


def as_json(schedule: Schedule) -> str:
    """`{"init_noise_sigma": …, "rows": [{"t": …, "c_in": …, "b": […], …}]}`, `limit` null where nothing is clipped."""
    names = [name for name in (*_SINGLE, "b", *_LAST) if name != "quantile" or np.any(schedule.quantile)]
    lists = {name: getattr(schedule, name).tolist() for name in names}
    # JSON knows no infinity.
    lists["limit"] = [None if limit == math.inf else limit for limit in lists["limit"]]
    rows = (dict(zip(names, values, strict=True)) for values in zip(*lists.values(), strict=True))
    # A row on each line, so that the file can be read and compared line by line.
    lines = ",\n".join(f"    {json.dumps(row, allow_nan=False)}" for row in rows)
    return f'{{\n  "init_noise_sigma": {json.dumps(schedule.init_noise_sigma)},\n  "rows": [\n{lines}\n  ]\n}}\n'


def as_csv(schedule: Schedule) -> str:
    """A line of names and a line for each row; `inf` where nothing is clipped."""
    found, text = columns(schedule), io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(found)
    writer.writerows(zip(*(column.tolist() for column in found.values()), strict=True))
    return text.getvalue()


def as_table(schedule: Schedule, title: str) -> str:
    """A title, the columns that do something, side by side with their row's number, and which ones do nothing."""
    found = columns(schedule)
    shown = active(schedule)
    cells = [["row", *map(str, range(len(schedule)))]]
    cells += [[name, *map(_short, column.tolist())] for name, column in shown.items()]
    cells.insert(2, ["sigma", *map(_short, _levels(schedule))])
    widths = [max(map(len, column)) for column in cells]
    lines = [title, f"init_noise_sigma {schedule.init_noise_sigma:.9g}", ""]
    lines += [_line(row, widths) for row in zip(*cells, strict=True)]
    if idle := [name for name in found if name not in shown]:
        lines += ["", f"left out, as they do nothing in any row: {', '.join(idle)}"]
    return "\n".join(lines) + "\n"


def _levels(schedule: Schedule) -> list[float]:
    """The noise beside an unscaled picture at each row, which is no column of the formula."""
    with np.errstate(divide="ignore"):
        levels: list[float] = (schedule.sigma / schedule.alpha).tolist()
    return levels


def _line(row: Iterable[str], widths: list[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _short(value: Any) -> str:
    # + 0.0: no −0
    return f"{value + 0.0:.6g}" if isinstance(value, float) else str(value)

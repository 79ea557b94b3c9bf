"""What does a sampler's table look like?

A picture of the noise level and of the coefficients over the rows. The same table gives the same file to the byte, with
one version of matplotlib; a style or a matplotlibrc of the user's changes nothing.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import MissingExtraError, OutputError
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.schedule_table import active

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plot_place", "drawn"]

# Extension → what a file of that format would say of the time it was made, left out.
_FORMATS: Mapping[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}

# The colours of Okabe and Ito, which people of any colour vision tell apart, without the yellow that is lost on white;
# what shares a colour has another line and another marker.
_COLOURS = ("#000000", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^vPX*<>hd"
_STYLE = {
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d9d9d9",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.dpi": 150.0,
    "svg.hashsalt": "latentrt",
}
_MAX_LINEAR = 20  # coefficients beyond it flatten those around 1
_MAX_MARKED = 60  # rows; more of them hide the lines
_MOST_TICKS = 12
_NAMES_A_COLUMN = 12  # of a legend
_TOP_INCHES, _PANEL_INCHES, _WIDTH_INCHES = 2.4, 2.9, 9.0


def check_plot_place(path: Path) -> None:
    """Ask, before the work, whether a picture of a table can be made for this path.

    Raises:
        OutputError: the extension is unknown. MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _FORMATS:
        raise OutputError(f"{path} has the extension {path.suffix!r}, expected one of {', '.join(_FORMATS)}")
    _matplotlib()


def drawn(schedule: Schedule, extension: str, title: str) -> bytes:
    """A picture of a table, as the bytes of a file.

    Args:
        extension: `.svg`, `.pdf` or `.png`.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = _matplotlib()
    stream = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE], after_reset=True):
        figure = _figure(schedule, title)
        form = extension.lower()
        figure.savefig(stream, format=form.removeprefix("."), metadata=_FORMATS[form])
    return stream.getvalue()


def _matplotlib() -> Any:
    """The one place that imports it, without the parts that want a screen."""
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.style
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "draw a sampler's table") from error
    return matplotlib


def _figure(schedule: Schedule, title: str) -> Figure:
    groups = _groups(schedule)
    heights = [_TOP_INCHES, *(_PANEL_INCHES for _ in groups)]
    figure: Figure = _matplotlib().figure.Figure(figsize=(_WIDTH_INCHES, sum(heights)), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    top, *panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_levels(top, schedule)
    for panel, (heading, found) in zip(panels, groups.items(), strict=True):
        _draw_coefficients(panel, heading, found)
    last = (panels or [top])[-1]
    last.set_xlabel("row, one evaluation of the model (a coefficient of 0 is not drawn)")
    last.set_xticks(_ticks(len(schedule)))
    last.set_xlim(-0.5, len(schedule) - 0.5)
    return figure


def _ticks(rows: int) -> NDArray[np.int64]:
    return np.arange(0, rows, -(-rows // _MOST_TICKS))


def _groups(schedule: Schedule) -> dict[str, dict[str, NDArray[Any]]]:
    """What the coefficients make → those that do something, of the way to what is remembered and of the step."""
    found = {name: column for name, column in active(schedule).items() if name not in ("t", "noise_draws")}
    step = {name: column for name, column in found.items() if name in "aeds" or name.startswith("b")}
    others = {name: column for name, column in found.items() if name not in step}
    groups = {
        "y = clip(p · x + q · m, ±limit) of the model's output m for c_in · x;  h = u · x + w · y": others,
        "next x = a · x + e · x before + d · m + b0 · h + b1 · h before + … + s · noise": step,
    }
    return {heading: columns for heading, columns in groups.items() if columns}


def _draw_levels(axes: Axes, schedule: Schedule) -> None:
    """σ / α at each row, and above it the timesteps."""
    rows = np.arange(len(schedule))
    level = np.divide(schedule.sigma, schedule.alpha, out=np.full(len(rows), np.inf), where=schedule.alpha != 0)
    shown = np.isfinite(level) & (level > 0)
    axes.plot(rows[shown], level[shown], color=_COLOURS[2], marker="o", markersize=_marker_size(len(rows)))
    axes.set_yscale("log")
    axes.set_ylabel("noise level σ / α (log)")
    if not shown.all():
        left_out = ", ".join(f"{value:g} at row {row}" for row, value in zip(rows[~shown], level[~shown], strict=True))
        x, side = (0.01, "left") if level[-1] > level[0] else (0.99, "right")  # where the line is not
        axes.annotate(f"not on a log axis: {left_out}", (x, 0.94), xycoords="axes fraction", ha=side, va="top")
    above, ticks = axes.secondary_xaxis("top"), _ticks(len(rows))
    above.set_xticks(ticks, [f"{t:.4g}" for t in schedule.t[ticks]])
    above.set_xlabel("timestep t")


def _draw_coefficients(axes: Axes, heading: str, columns: Mapping[str, NDArray[Any]]) -> None:
    for index, (name, column) in enumerate(columns.items()):
        # Two-stage methods would jump to 0 at every other row. A limit is infinite where there is none.
        rows = np.flatnonzero(np.isfinite(column) & (column != 0))
        axes.plot(
            rows,
            column[rows],
            label=name,
            color=_COLOURS[index % len(_COLOURS)],
            linestyle=_LINES[index % len(_LINES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=_marker_size(len(rows)),
            linewidth=1.4,
        )
    largest = max(np.abs(column[np.isfinite(column)]).max() for column in columns.values())
    if largest > _MAX_LINEAR:
        axes.set_yscale("symlog", linthresh=1)
    axes.set_ylabel("coefficient (log beyond ±1)" if largest > _MAX_LINEAR else "coefficient")
    axes.axhline(0, color="#808080", linewidth=0.8)
    axes.set_title(heading, loc="left", fontsize=9)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=-(-len(columns) // _NAMES_A_COLUMN))


def _marker_size(rows: int) -> float:
    return 4.0 if rows <= _MAX_MARKED else 0.0

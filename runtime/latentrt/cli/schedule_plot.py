"""Plots of a schedule: the noise level and the coefficients over the rows.

With one version of matplotlib a schedule always gives the same bytes, regardless of the user's matplotlibrc.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.printable import quote
from latentrt.errors import MissingExtraError, OutputError
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.schedule_table import active_columns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_plot_path", "render_plot"]

# extension → metadata that removes the time of creation.
_FORMATS: Mapping[str, dict[str, Any]] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}, ".png": {}}

# The palette of Okabe and Ito, distinguishable with any colour vision, without its yellow, which is invisible on white;
# lines that share a colour differ in style and marker.
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
_MAX_LINEAR = 20  # larger coefficients flatten those around 1
_MAX_MARKED = 60  # rows; more markers hide the lines
_MAX_TICKS = 12
_LEGEND_ROWS = 12
_TOP_INCHES, _PANEL_INCHES, _WIDTH_INCHES = 2.4, 2.9, 9.0


def check_plot_path(path: Path) -> None:
    """Check that a plot can be written in the format of this path.

    Raises:
        OutputError: the extension is unknown. MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _FORMATS:
        raise OutputError(f"`plot` has the extension {quote(path.suffix)}, expected one of {', '.join(_FORMATS)}")
    _import_matplotlib()


def render_plot(schedule: Schedule, extension: str, title: str) -> bytes:
    """Return a plot of a schedule as the bytes of a file.

    Args:
        schedule: the table.
        extension: `.svg`, `.pdf` or `.png`.
        title: the heading of the plot.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matplotlib = _import_matplotlib()
    stream = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE], after_reset=True):
        figure = _make_figure(schedule, title)
        form = extension.lower()
        figure.savefig(stream, format=form.removeprefix("."), metadata=_FORMATS[form])
    return stream.getvalue()


def _import_matplotlib() -> Any:
    """Import matplotlib, without modules that need a display.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.style
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "plot a schedule") from error
    return matplotlib


def _make_figure(schedule: Schedule, title: str) -> Figure:
    groups = _group_columns(schedule)
    heights = [_TOP_INCHES, *(_PANEL_INCHES for _ in groups)]
    figure: Figure = _import_matplotlib().figure.Figure(figsize=(_WIDTH_INCHES, sum(heights)), layout="constrained")
    figure.suptitle(title, fontsize=12, fontweight="bold", parse_math=False)
    top, *panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _plot_noise_level(top, schedule)
    for panel, (heading, columns) in zip(panels, groups.items(), strict=True):
        _plot_coefficients(panel, heading, columns)
    last = (panels or [top])[-1]
    last.set_xlabel("row, one model evaluation (a coefficient of 0 is not shown)")
    last.set_xticks(_tick_rows(len(schedule)))
    last.set_xlim(-0.5, len(schedule) - 0.5)
    return figure


def _tick_rows(rows: int) -> NDArray[np.int64]:
    return np.arange(0, rows, -(-rows // _MAX_TICKS))


def _group_columns(schedule: Schedule) -> dict[str, dict[str, NDArray[Any]]]:
    """Return the columns that have an effect, by the formula that they belong to."""
    columns = {name: column for name, column in active_columns(schedule).items() if name not in ("t", "noise_draws")}
    step = {name: column for name, column in columns.items() if name in "aeds" or name.startswith("b")}
    history = {name: column for name, column in columns.items() if name not in step}
    groups = {
        "y = clip(p · x + q · m, ±limit) with m the model output for c_in · x;  h = u · x + w · y": history,
        "x[k+1] = a · x[k] + e · x[k−1] + d · m + b0 · h[k] + b1 · h[k−1] + … + s · z": step,
    }
    return {formula: group for formula, group in groups.items() if group}


def _plot_noise_level(axes: Axes, schedule: Schedule) -> None:
    """Plot σ / α at each row, with the timesteps on an axis above."""
    rows = np.arange(len(schedule))
    level = np.divide(schedule.sigma, schedule.alpha, out=np.full(len(rows), np.inf), where=schedule.alpha != 0)
    plotted = np.isfinite(level) & (level > 0)
    axes.plot(rows[plotted], level[plotted], color=_COLOURS[2], marker="o", markersize=_marker_size(len(rows)))
    axes.set_yscale("log")
    axes.set_ylabel("noise level σ / α (log)")
    if not plotted.all():
        omitted = ", ".join(
            f"{value:g} at row {row}" for row, value in zip(rows[~plotted], level[~plotted], strict=True)
        )
        x, side = (0.01, "left") if level[-1] > level[0] else (0.99, "right")  # away from the line
        axes.annotate(f"not on a log axis: {omitted}", (x, 0.94), xycoords="axes fraction", ha=side, va="top")
    above, ticks = axes.secondary_xaxis("top"), _tick_rows(len(rows))
    above.set_xticks(ticks, [f"{t:.4g}" for t in schedule.t[ticks]])
    above.set_xlabel("timestep t")


def _plot_coefficients(axes: Axes, heading: str, columns: Mapping[str, NDArray[Any]]) -> None:
    for index, (name, column) in enumerate(columns.items()):
        # Zeros are omitted, as two-stage methods would jump to 0 at every other row; an absent limit is infinite.
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
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), ncols=-(-len(columns) // _LEGEND_ROWS))


def _marker_size(rows: int) -> float:
    return 4.0 if rows <= _MAX_MARKED else 0.0

"""The plot of convergence: a panel per family of solvers, error over evaluations, both logarithmic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.convergence import Measured, Point

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("the plot needs matplotlib; pip install 'latentrt[plot]'") from None

__all__ = ["plot"]

COLUMNS = 3
# The palette of Okabe and Ito, distinguishable with any colour vision; one colour per claimed order.
COLOURS = {1: "#0072B2", 2: "#D55E00", 3: "#009E73", 4: "#CC79A7"}
MARKERS = "os^Dv"
SLOPES_START = (8, 0.25)  # the start of the guide lines
FEWEST, MOST = 5.5, 640
LOWEST, HIGHEST = 2e-11, 1.0
# Makes the file reproducible.
REPRODUCIBLE: Any = {"svg.hashsalt": "latentrt", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}


def plot(measured: Sequence[Measured], fitted: Sequence[int], path: Path) -> None:
    """Plot all solvers to a file.

    Args:
        measured: all solvers.
        fitted: the numbers of evaluations over which orders were fitted.
        path: an SVG file.
    """
    families = list(dict.fromkeys(each.family for each in measured))
    rows = -(-len(families) // COLUMNS)
    with mpl.rc_context(REPRODUCIBLE):
        figure = Figure(figsize=(4.1 * COLUMNS, 3.5 * rows), layout="constrained")
        grid = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False)
        for panel, family in zip(grid.flat, families, strict=False):
            _frame(panel, family, fitted)
            _curves(panel, [each for each in measured if each.family == family])
        for unused in grid.flat[len(families) :]:
            unused.set_visible(False)
        figure.supxlabel("evaluations of the model")
        figure.supylabel("relative error of the latent")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def _frame(panel: Axes, family: str, fitted: Sequence[int]) -> None:
    """Set up a panel: the axes, the range of the fit, and a guide line for each order."""
    panel.set_title(family, fontsize=10)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlim(FEWEST, MOST)
    panel.set_ylim(LOWEST, HIGHEST)
    panel.set_xticks([8, 16, 32, 64, 128, 256, 512], labels=["8", "16", "32", "64", "128", "256", "512"])
    panel.minorticks_off()
    panel.axvspan(fitted[0], fitted[-1], color="0.94", zorder=0)
    count, error = SLOPES_START
    for order in COLOURS:
        end = error * (count / fitted[-1]) ** order
        panel.plot([count, fitted[-1]], [error, end], color="0.6", linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
        panel.annotate(
            str(order), (fitted[-1], end), xytext=(3, 0), textcoords="offset points", color="0.4", va="center"
        )


def _curves(panel: Axes, family: Sequence[Measured]) -> None:
    """Plot the solvers of a family; dotted, runs from their own start where that lowers the order."""
    markers = {order: cycle(MARKERS) for order in COLOURS}
    for each in family:
        colour, marker = COLOURS[each.paper], next(markers[each.paper])
        _curve(panel, each.points, f"{each.name}: {each.order:.2f}", colour, marker, "-")
        if each.order - each.own_start > 0.2:
            _curve(panel, each.own_start_points, f"its own start: {each.own_start:.2f}", colour, marker, ":")
    panel.legend(loc="lower left", fontsize=7, frameon=False, labelspacing=0.25, handlelength=2.2)


def _curve(panel: Axes, points: Sequence[Point], label: str, colour: str, marker: str, line: str) -> None:
    panel.plot(
        [point.evaluations for point in points],
        [point.error for point in points],
        label=label,
        color=colour,
        marker=marker,
        linestyle=line,
        linewidth=1.1,
        markersize=3.2,
        markerfacecolor=colour if line == "-" else "white",
    )

"""How fast and how large is each program? Two panels, a bar for each configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peer_report import figure

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("found no matplotlib, which draws the plot; pip install 'latentrt[plot]'") from None

__all__ = ["draw"]

# Okabe and Ito's colours: peers' of each type light, ours full.
COLOURS = {32: "#0072B2", 16: "#D55E00", 8: "#009E73"}
PEERS_ALPHA = 0.45
_NAMES = {32: "float32", 16: "16 bits", 8: "int8"}
_GIB = 2**30
# What makes two runs write the same file.
REPRODUCIBLE: Any = {"svg.hashsalt": "latentrt", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write the plot: seconds of a step (of the UNet where nothing was drawn) and the largest resident set.

    Args:
        report: of `benchmarks.peers`.
        path: an SVG file.
    """
    shown = _in_order(report)
    with mpl.rc_context(REPRODUCIBLE):
        drawing = Figure(figsize=(9.6, 0.9 + 0.27 * max(len(shown), 1)), layout="constrained")
        steps, memory = drawing.subplots(1, 2, sharey=True, width_ratios=(1.4, 1))
        _bars(steps, [(name, each, _step_s(each)) for name, each in shown], "seconds of a step, guided")
        peaks = [(name, each, (figure(each, "peak_resident_bytes") or 0.0) / _GIB) for name, each in shown]
        _bars(memory, peaks, "largest resident set, GiB")
        steps.set_yticks(range(len(shown)), [name for name, _ in shown])
        for label, (_, each) in zip(steps.get_yticklabels(), shown, strict=True):
            label.set_fontweight("bold" if each["ours"] else "normal")
        steps.invert_yaxis()
        path.parent.mkdir(parents=True, exist_ok=True)
        drawing.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def _step_s(configuration: Mapping[str, Any]) -> float:
    return figure(configuration, "step_s") or figure(configuration, "unet") or 0.0


def _in_order(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """By type, and the fastest first."""
    return sorted(report["configurations"].items(), key=lambda pair: (-pair[1]["bits"], _step_s(pair[1])))


def _bars(panel: Axes, values: list[tuple[str, Mapping[str, Any], float]], title: str) -> None:
    for place, (_, each, value) in enumerate(values):
        panel.barh(place, value, color=COLOURS[each["bits"]], alpha=1.0 if each["ours"] else PEERS_ALPHA, height=0.72)
        panel.annotate(
            f"{value:.3g}", (value, place), xytext=(3, 0), textcoords="offset points", va="center", fontsize=7.5
        )
    panel.set_title(title, fontsize=10)
    panel.margins(x=0.14)
    panel.spines[["top", "right"]].set_visible(False)
    for bits in dict.fromkeys(each["bits"] for _, each, _ in values):
        panel.barh(0, 0, color=COLOURS[bits], label=_NAMES[bits])
    panel.legend(loc="lower right", fontsize=7.5, frameon=False)

"""The plot of a peers report: time of a step and peak memory, a bar for each configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peer_report import median_value

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError:
    raise SystemExit("the plot needs matplotlib; pip install 'latentrt[plot]'") from None

__all__ = ["write_plot"]

# The palette of Okabe and Ito, a colour for each type: light for peers, full for latentrt.
COLOURS = {32: "#0072B2", 16: "#D55E00", 8: "#009E73"}
PEERS_ALPHA = 0.45
_NAMES = {32: "float32", 16: "16 bits", 8: "int8"}
_GIB = 2**30
# Makes the file reproducible.
REPRODUCIBLE: Any = {"svg.hashsalt": "latentrt", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9}


def write_plot(report: Mapping[str, Any], path: Path) -> None:
    """Write the plot: seconds of a step (of the UNet if no image was generated) and the largest resident set.

    Args:
        report: the report of `benchmarks.peers`.
        path: the SVG file to write.
    """
    shown = _in_order(report)
    with mpl.rc_context(REPRODUCIBLE):
        plot = Figure(figsize=(9.6, 0.9 + 0.27 * max(len(shown), 1)), layout="constrained")
        steps, memory = plot.subplots(1, 2, sharey=True, width_ratios=(1.4, 1))
        _bars(steps, [(name, each, _step_s(each)) for name, each in shown], "seconds of a step, guided")
        peaks = [(name, each, (median_value(each, "peak_resident_bytes") or 0.0) / _GIB) for name, each in shown]
        _bars(memory, peaks, "largest resident set, GiB")
        steps.set_yticks(range(len(shown)), [name for name, _ in shown])
        for label, (_, each) in zip(steps.get_yticklabels(), shown, strict=True):
            label.set_fontweight("bold" if each["ours"] else "normal")
        steps.invert_yaxis()
        path.parent.mkdir(parents=True, exist_ok=True)
        plot.savefig(path, format="svg", facecolor="white", metadata={"Date": None})


def _step_s(configuration: Mapping[str, Any]) -> float:
    return median_value(configuration, "step_s") or median_value(configuration, "unet") or 0.0


def _in_order(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Sort configurations by type, the fastest first."""
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

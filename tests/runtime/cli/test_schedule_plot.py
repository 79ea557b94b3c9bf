from __future__ import annotations

import io
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from PIL import Image

from latentrt.cli.schedule_plot import check_plot_path, render_plot
from latentrt.errors import MissingExtraError, OutputError
from latentrt.sampling import samplers
from latentrt.sampling.samplers import SAMPLERS
from latentrt.sampling.schedule import Schedule


def table(name: str = "dpmpp_2m", steps: int = 6, **options: Any) -> Schedule:
    return samplers.schedule(name, {}, steps, options=options)


def texts(svg: bytes) -> list[str]:
    """Return the texts of a plot: matplotlib writes their outlines and keeps the text in comments."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    root = ET.fromstring(svg, parser)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return [(node.text or "").strip() for node in root.iter() if not isinstance(node.tag, str)]


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "vq_diffusion"])
def test_every_table_can_be_plotted(name: str) -> None:
    labels = texts(render_plot(table(name), ".svg", f"{name}, $ 6 steps"))
    assert f"{name}, $ 6 steps" in labels
    assert "timestep t" in labels


def test_the_plot_is_labelled() -> None:
    labels = texts(render_plot(table(), ".svg", "title"))
    # Timesteps, units, and a legend of the active columns.
    assert {"999", "832", "noise level σ / α (log)", "coefficient (log beyond ±1)", "coefficient"} <= set(labels)
    assert {"p", "q", "a", "b0", "b1"} <= set(labels)
    assert not {"c_in", "limit", "u", "w", "e", "d", "s", "noise_draws"} & set(labels)


@pytest.mark.parametrize("extension", [".svg", ".png", ".pdf"])
def test_the_same_table_is_the_same_file(extension: str) -> None:
    first = render_plot(table("unipc"), extension, "title")
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": "another"}):
        assert render_plot(table("unipc"), extension, "title") == first
    assert render_plot(table("heun"), extension, "title") != first


def test_formats() -> None:
    assert render_plot(table(), ".PDF", "title").startswith(b"%PDF-")
    with Image.open(io.BytesIO(render_plot(table(), ".png", "title"))) as image:
        assert image.format == "PNG"
        assert min(image.size) > 1000
        colours = image.convert("RGB").getcolors(1 << 20)
        assert colours is not None
        assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= {colour for _, colour in colours}


@pytest.mark.parametrize(
    ("name", "options", "label"),
    [
        ("ddim_inverse", {}, "not on a log axis: 0 at row 0"),
        ("flow_euler", {}, "not on a log axis: inf at row 0"),
    ],
)
def test_noise_levels_without_a_logarithm_are_listed(name: str, options: dict[str, Any], label: str) -> None:
    assert label in texts(render_plot(table(name, 3, **options), ".svg", "title"))


@pytest.mark.parametrize("steps", [1, 61, 1000])
def test_few_rows_and_many(steps: int) -> None:
    assert "row, one model evaluation (a coefficient of 0 is not shown)" in texts(
        render_plot(table("ddim", steps), ".svg", "title")
    )


def test_a_table_without_active_columns() -> None:
    still = Schedule.of(t=np.arange(2), a=0.0, b=np.zeros((2, 1)), alpha=1.0, sigma=1.0, p=0.0, q=0.0)
    assert "noise level σ / α (log)" in texts(render_plot(still, ".svg", "title"))


def test_other_formats_are_rejected() -> None:
    for name in ("plot.svg", "plot.PNG", "folder/plot.pdf"):
        check_plot_path(Path(name))
    for name in ("plot.gif", "plot", "svg"):
        with pytest.raises(OutputError, match=r"\.svg, \.pdf, \.png"):
            check_plot_path(Path(name))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'latentrt\[plot\]'"):
        check_plot_path(Path("plot.svg"))
    with pytest.raises(MissingExtraError):
        render_plot(table(), ".svg", "title")


def test_the_callers_settings_stay() -> None:
    code = (
        "import sys, matplotlib\n"
        "def settings(): return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
        "before = settings()\n"
        "from latentrt.sampling import samplers\nfrom latentrt.cli.schedule_plot import render_plot\n"
        "render_plot(samplers.schedule('ddim', {}, 3), '.svg', 'title')\n"
        "assert settings() == before\nassert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)

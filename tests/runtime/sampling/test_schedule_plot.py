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

from latentrt.errors import MissingExtraError, OutputError
from latentrt.sampling import samplers
from latentrt.sampling.samplers import SAMPLERS
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.schedule_plot import check_plot_place, drawn


def table(name: str = "dpmpp_2m", steps: int = 6, **options: Any) -> Schedule:
    return samplers.schedule(name, {}, steps, options=options)


def texts(svg: bytes) -> list[str]:
    """The texts of a picture: matplotlib draws their outlines and leaves the words in a comment."""
    parser = ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    root = ET.fromstring(svg, parser)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return [(node.text or "").strip() for node in root.iter() if not isinstance(node.tag, str)]


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "vq_diffusion"])
def test_every_table_can_be_drawn(name: str) -> None:
    said = texts(drawn(table(name), ".svg", f"{name}, $ 6 steps"))
    assert f"{name}, $ 6 steps" in said
    assert "timestep t" in said


def test_what_is_written_in_it() -> None:
    said = texts(drawn(table(), ".svg", "title"))
    # The timesteps, the units, and a legend of what does something.
    assert {"999", "832", "noise level σ / α (log)", "coefficient (log beyond ±1)", "coefficient"} <= set(said)
    assert {"p", "q", "a", "b0", "b1"} <= set(said)
    assert not {"c_in", "limit", "u", "w", "e", "d", "s", "noise_draws"} & set(said)


@pytest.mark.parametrize("extension", [".svg", ".png", ".pdf"])
def test_the_same_table_is_the_same_file(extension: str) -> None:
    first = drawn(table("unipc"), extension, "title")
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "svg.hashsalt": "another"}):
        assert drawn(table("unipc"), extension, "title") == first
    assert drawn(table("heun"), extension, "title") != first


def test_each_format_is_what_it_says() -> None:
    assert drawn(table(), ".PDF", "title").startswith(b"%PDF-")
    with Image.open(io.BytesIO(drawn(table(), ".png", "title"))) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 1000
        colours = picture.convert("RGB").getcolors(1 << 20)
        assert colours is not None
        assert {(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)} <= {colour for _, colour in colours}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ddim_inverse", {}, "not on a log axis: 0 at row 0"),
        ("flow_euler", {}, "not on a log axis: inf at row 0"),
    ],
)
def test_a_level_that_a_log_axis_has_no_place_for(name: str, options: dict[str, Any], words: str) -> None:
    assert words in texts(drawn(table(name, 3, **options), ".svg", "title"))


@pytest.mark.parametrize("steps", [1, 61, 1000])
def test_few_rows_and_many(steps: int) -> None:
    assert "row, one evaluation of the model (a coefficient of 0 is not drawn)" in texts(
        drawn(table("ddim", steps), ".svg", "title")
    )


def test_a_table_that_does_nothing() -> None:
    still = Schedule.of(t=np.arange(2), a=0.0, b=np.zeros((2, 1)), alpha=1.0, sigma=1.0, p=0.0, q=0.0)
    assert "noise level σ / α (log)" in texts(drawn(still, ".svg", "title"))


def test_a_place_that_cannot_be_drawn_to() -> None:
    for name in ("plot.svg", "plot.PNG", "folder/plot.pdf"):
        check_plot_place(Path(name))
    for name in ("plot.gif", "plot", "svg"):
        with pytest.raises(OutputError, match=r"expected one of \.svg, \.pdf, \.png"):
            check_plot_place(Path(name))


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'latentrt\[plot\]'"):
        check_plot_place(Path("plot.svg"))
    with pytest.raises(MissingExtraError):
        drawn(table(), ".svg", "title")


def test_nothing_is_changed_for_the_caller() -> None:
    code = (
        "import sys, matplotlib\n"
        "def settings(): return {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
        "before = settings()\n"
        "from latentrt import samplers\nfrom latentrt.sampling.schedule_plot import drawn\n"
        "drawn(samplers.schedule('ddim', {}, 3), '.svg', 'title')\n"
        "assert settings() == before\nassert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)

"""A small report of `benchmarks.peers`, as tables and as a plot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import peers
from benchmarks.peer_plot import write_plot
from benchmarks.peer_report import Bar, bars, markdown, median_value


def configuration(bits: int, unet: list[list[float]], **others: Any) -> dict[str, Any]:
    """Its rounds' calls of the UNet; a step takes twice as long, and each round has two images."""
    rounds = [
        {
            "first_image_s": 30.0,
            "image_s": [10.0 * calls[0], 12.0 * calls[0]],
            "step_s": [2 * seconds for seconds in calls],
            "components": {"unet": calls},
            "peak_resident_bytes": 3 << 30,
            "peak_anonymous_bytes": 1 << 30,
            "psnr_db": 41.26,
        }
        for calls in unet
    ]
    given = {"bits": bits, "ours": False, "accelerated": False, "environment": "torch", "model_mb": 4260.0, "note": ""}
    return {**given, "rounds": rounds, **others}


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "command": "python -m benchmarks.peers scratch/full/checkpoint --steps 4",
        "machine": {"cpu": "Some CPU", "cores": 2, "memory_gib": 16.0, "python": "3.11.7"},
        "settings": {"size": 512, "steps": 4, "rounds": 3, "threads": 2, "guidance_scale": 7.5, "components": False},
        "environments": {
            "torch": {
                "installed_mb_without_byte_code": 1234.5,
                "import_s": 3.456,
                "packages": {"torch": "2.13.0", "Diffusers": "0.42.1", "tqdm": "4"},
            }
        },
        "configurations": {
            "slow peer": configuration(32, [[8.0, 8.0], [8.0, 8.0], [8.0, 8.0]], note="is noisy"),
            # A slow hour: all of the second round takes ten times as long.
            "fast peer": configuration(32, [[4.0, 4.2], [40.0, 42.0], [4.0, 4.2]]),
            "ours": configuration(32, [[4.5, 4.7], [36.9, 36.9], [4.1, 4.1]], ours=True),
            "ours, cached": configuration(32, [[1.0], [1.0], [1.0]], ours=True, accelerated=True),
            "half peer": configuration(16, [[2.0], [2.0], [2.0]]),
            "ours, half": configuration(16, [[2.3], [2.3], [2.3]], ours=True),
            "int8 peer": configuration(8, [[1.5], [1.5], [1.5]]),
        },
        "psnr_of_another_seed_db": 12.3,
        "skipped": {"some peer": "the environment some peer could not be installed: no network"},
    }


def test_values_are_medians_of_the_rounds_medians(report: dict[str, Any]) -> None:
    fast = report["configurations"]["fast peer"]
    assert median_value(fast, "unet") == pytest.approx(4.1)
    assert median_value(fast, "image_s") == pytest.approx(44.0)
    assert median_value(fast, "first_image_s") == 30.0
    assert median_value(fast, "vae_decoder") is None


def test_bars_compare_the_best_of_each_type_round_by_round(report: dict[str, Any]) -> None:
    found = {(bar.bits, bar.column): bar for bar in bars(report)}
    # 4.6 / 4.1, 36.9 / 41, 4.1 / 4.1: the middle one, while the medians' ratio would be that of other rounds.
    unet, step = found[32, "unet"], found[16, "step_s"]
    assert (unet.ours, unet.peer, unet.met) == ("ours", "fast peer", True)
    assert unet.ratio == pytest.approx(1.0)
    assert (step.ours, step.peer, step.met) == ("ours, half", "half peer", False)
    assert step.ratio == pytest.approx(1.15)
    # There is no value of the decoder, and no int8 configuration of ours.
    assert {bits for bits, _ in found} == {32, 16}
    assert {column for _, column in found} == {"step_s", "image_s", "first_image_s", "unet"}


@pytest.mark.parametrize(("ratio", "met"), [(0.4, True), (1.1, True), (1.11, False)])
def test_ten_percent_are_noise(ratio: float, met: bool) -> None:
    assert Bar(32, "unet", "ours", "peer", ratio).met is met


def test_tables(report: dict[str, Any]) -> None:
    lines = markdown(report).splitlines()
    assert lines[0] == "    python -m benchmarks.peers scratch/full/checkpoint --steps 4"
    assert "2 cores of an Some CPU, 16.0 GiB" in lines[2]
    times = [line for line in lines if "peer | 8" in line or "ours" in line or line.startswith("| slow")]
    assert times[0] == "| **ours, cached** | 2 (2–2) | 11 (11–11) | 30 (30–30) | – | 1 (1–1) | – | 41.3 |"
    assert "| slow peer | 16 (16–16) | 88 (88–88) | 30 (30–30) | – | 8 (8–8) | – | 41.3 |" in lines
    assert "| fast peer | 8.2 (8.2–82) | 44 (44–440) | 30 (30–30) | – | 4.1 (4.1–41) | – | 41.3 |" in lines
    assert "slow peer: is noisy." in lines
    assert "PSNR is against diffusers in float32; an image of another seed has 12.3 dB." in lines
    assert "| float32 | UNet s | ours | fast peer | 1.00 | yes |" in lines
    assert "| 16 bits | s / step | ours, half | half peer | 1.15 | **no** |" in lines
    assert "| slow peer | 3.00 | 1.00 | 4.26 | torch |" in lines
    assert "| torch | 1234 | 3.46 | 3 | diffusers 0.42.1, torch 2.13.0 |" in lines
    assert lines[-1] == "Skipped: some peer: the environment some peer could not be installed: no network."


def test_components_alone_have_no_values_of_images(report: dict[str, Any]) -> None:
    report["settings"]["components"] = True
    for each in report["configurations"].values():
        each["rounds"] = [{"components": one["components"], "peak_resident_bytes": 1} for one in each["rounds"]]
    lines = markdown(report).splitlines()
    assert "| slow peer | – | – | – | – | 8 (8–8) | – | – |" in lines
    assert not any("largest resident set" in line for line in lines)


def test_the_plot_is_the_same_each_time(report: dict[str, Any], tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "first.svg", tmp_path / "second.svg"
    write_plot(report, first)
    write_plot(report, second)
    assert first.read_text() == second.read_text()
    text = first.read_text()
    places = [text.index(f">{name}<") for name in ("ours, cached", "fast peer", "slow peer", "half peer", "int8 peer")]
    assert places == sorted(places)
    assert ">largest resident set, GiB<" in text


def test_a_report_is_shown_again(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, table, plot = tmp_path / "report.json", tmp_path / "tables.md", tmp_path / "plot.svg"
    path.write_text(json.dumps(report))
    shown = ["--render", str(path), "--markdown", str(table), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["peers", *shown])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert ended.value.code == 0
    assert table.read_text() == capsys.readouterr().out == markdown(report) + "\n"
    assert plot.read_text().startswith("<?xml")

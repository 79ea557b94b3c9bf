"""The progress of an export: one readable line per graph, and a log of the components done."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import msgspec
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Manifest
from latentrt.cli.console import Console
from latentrt_export.report import Reporter, print_table
from tests.export.fake_worker import COST, fake_component
from tests.export.test_worker import JOB
from tests.exported import Exported


def printed(manifest: Manifest, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    print_table(manifest, dict.fromkeys(manifest.components, COST), console)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("width", [80, 120])
def test_the_table_has_a_line_per_graph(request: pytest.FixtureRequest, family: str, width: int) -> None:
    exported: Exported = request.getfixturevalue(family)
    manifest = Bundle.open(exported.bundle).manifest
    lines = printed(manifest, width)
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["component", "graph", "nodes", "weights", "size", "memory", "gate"]
    graphs = sum(len(component.graphs) for component in manifest.components.values())
    parts = manifest.components["unet"].parts
    graphs += sum(len(part.graphs) for part in parts.values()) + 1  # the decoder's slices
    end = next(index for index, line in enumerate(lines) if line.startswith("memory:"))
    rows = lines[2:end]
    assert len(rows) == graphs
    for name, component in manifest.components.items():
        row = next(row for row in rows if row.startswith(name))
        assert str(next(iter(component.graphs.values())).nodes) in row.split()
        assert " ≤ " in row
        assert "GiB" in row
    for part_name, part in parts.items():
        row = next(row for row in rows if row.startswith(f"  {part_name} "))
        assert row.split()[1:3] == [next(iter(part.graphs)), str(next(iter(part.graphs.values())).nodes)]
    assert "…" not in "".join(lines)


def test_a_full_size_model_fits_as_well(sd1: Exported) -> None:
    manifest = Bundle.open(sd1.bundle).manifest
    component = fake_component(JOB)
    large = dict.fromkeys(manifest.components, component)
    files = {**manifest.files, "text_encoder/model.safetensors": manifest.files["LICENSE"]}
    lines = printed(msgspec.structs.replace(manifest, components=large, files=files), 80)
    assert any("123 M" in line and "3.0 GiB" in line and "2.0e-06 ≤ 1.0e-04" in line for line in lines)
    assert all(len(line) <= 80 for line in lines if "GiB" in line)


def test_a_log_has_a_line_per_finished_component(capsys: pytest.CaptureFixture[str]) -> None:
    with Reporter() as reporter:
        reporter.phase("text_encoder", "tracing")
        assert capsys.readouterr().err == ""
        reporter.warn("[bold]something[/bold] " + "long " * 20)
        reporter.done("text_encoder", fake_component(JOB), COST)
        lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("warning: [bold]something[/bold] long")
    assert lines[1] == "text_encoder    done in 12 s (0 s so far), peak memory 3.0 GiB"
    assert len(lines) == 2
    assert capsys.readouterr().err == "", "nothing is added at the end"


def test_a_slow_component_has_a_line_per_step_and_one_at_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("latentrt.cli.progress.time", clock)
    with Reporter() as reporter:
        reporter.phase("text_encoder", "tracing")
        clock.now = 20.0
        reporter.phase("text_encoder", "storing weights")
        clock.now = 40.0
        reporter.done("text_encoder", fake_component(JOB), COST)
    assert capsys.readouterr().err.splitlines() == [
        "text_encoder    storing weights, 0:20 so far",
        "text_encoder    done in 12 s (0 s so far), peak memory 3.0 GiB",
    ]


def test_a_terminal_shows_the_phase_and_the_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with Reporter() as reporter:
        reporter.phase("text_encoder", "tracing")
        reporter.done("text_encoder", fake_component(JOB), COST)
    shown = capsys.readouterr().err
    assert "text_encoder" in shown
    assert "peak memory 3.0 GiB" in shown

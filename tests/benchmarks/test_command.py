"""The command lines of the benchmarks."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import benchmarks
from benchmarks import startup
from benchmarks.command import write_report

MODULES = [
    f"benchmarks.{file.stem}"
    for file in sorted(Path(benchmarks.__path__[0]).glob("*.py"))
    if "\n@benchmark(" in file.read_text()
]


def test_the_measurements_are_found() -> None:
    assert {"benchmarks.startup", "benchmarks.quality", "benchmarks.peers"} <= {*MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_help_is_the_docstring_line_by_line(name: str) -> None:
    module = importlib.import_module(name)
    assert isinstance(module.main, click.Command)
    shown = CliRunner().invoke(module.main, ["--help"], terminal_width=200)
    assert shown.exit_code == 0
    assert shown.output.startswith(f"Usage: python -m {name} ")
    lines = [line.strip() for line in shown.output.splitlines()]
    assert [line for line in (module.__doc__ or "").splitlines() if line.strip() not in lines] == []


def test_a_report_is_written_into_a_new_folder(tmp_path: Path) -> None:
    write_report(tmp_path / "new" / "report.json", {"paper": "Karras et al. 2022, σ"})
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == {"paper": "Karras et al. 2022, σ"}
    assert "σ" in (tmp_path / "new" / "report.json").read_text()


def test_commands_are_timed_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One untimed run, then those whose median counts."""
    monkeypatch.setattr(startup, "RUNS", 3)
    seconds = startup.median(["sh", "-c", f"echo run >> {tmp_path / 'runs'}; sleep 0.05"])
    assert 0.05 <= seconds < 5
    assert (tmp_path / "runs").read_text().splitlines() == ["run"] * 4

"""`python -m benchmarks.samplers`, with few steps and few prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import samplers as benchmark
from tests.exported import Exported


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["samplers", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "160")
    try:
        benchmark.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_an_interrupted_run_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, table = tmp_path / "new" / "samplers.json", tmp_path / "table.md"
    arguments = ("--prompts", "4", "--steps", "1,3", "--output", report, "--markdown", table)
    assert run(monkeypatch, *arguments, "--samplers", "euler") == 0
    first = json.loads(report.read_text())
    assert first["measured"]["euler"]["3"]["right_of"]["fully right"][1] == 4
    # An existing result is kept, even a different one.
    first["measured"]["euler"]["3"]["right_of"]["fully right"] = [3, 4]
    report.write_text(json.dumps(first))
    capsys.readouterr()
    assert run(monkeypatch, *arguments, "--samplers", "euler, pndm,heun") == 0
    found = json.loads(report.read_text())
    assert found["measured"]["euler"] == first["measured"]["euler"]
    assert "needs at least 4" in found["measured"]["pndm"]["1"]["refused"]
    assert found["measured"]["heun"]["3"]["evaluations"] == 5
    assert "two things" in capsys.readouterr().out
    lines = table.read_text().splitlines()
    assert lines[0] == "| sampler | 1 step | 3 steps |"
    assert lines[2].startswith("| `euler` | ")
    assert lines[2].endswith(" | 75.0% |")
    assert lines[3] == "| `pndm` | – | – |"
    assert "(5 evaluations)" in lines[4]


def test_impossible_arguments_are_refused(
    sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "samplers.json"
    report.write_text('{"settings": {"prompts": 256}}')
    for arguments, message in (
        ((), "samplers.json has results for other prompts or weights"),
        (("--steps", "5,x"), "--steps 5,x, expected whole numbers"),
        (("--prompts", "0"), "0 is not in the range x>=1"),
        (("--samplers", "eular"), "'eular'"),
        ((tmp_path,), "bundle.json"),
        ((sd1.bundle,), "is not of the sample model"),
    ):
        assert run(monkeypatch, *arguments, "--output", report) == 2
        assert message in capsys.readouterr().err
    assert report.read_text() == '{"settings": {"prompts": 256}}'

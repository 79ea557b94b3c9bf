"""Calls of the command line in tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from latentrt.cli import main as cli


@dataclass(frozen=True)
class Called:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


class Caller:
    """A caller of `latentrt …` that catches the exit and the output."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Called:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main([*map(str, arguments)])
        assert isinstance(end.value.code, int)
        captured = self._capsys.readouterr()
        assert "Traceback" not in captured.err
        return Called(end.value.code, captured.out, captured.err)

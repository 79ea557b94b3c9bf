"""The command line, called in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from latentrt.cli.main import main


@dataclass(frozen=True)
class Done:
    """A finished command: its exit code and output."""

    code: int
    out: str
    err: str


Caller = Callable[..., Done]


@pytest.fixture
def latentrt(capsys: pytest.CaptureFixture[str]) -> Caller:
    """Return a function that calls `latentrt` with its arguments."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        assert isinstance(end.value.code, int)
        captured = capsys.readouterr()
        return Done(end.value.code, captured.out, captured.err)

    return call

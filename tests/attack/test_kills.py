"""A few of the kills that `make attack` does by the hundred."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from tests.attack import kills


@pytest.mark.parametrize(
    "kind", ["build", pytest.param("seal", marks=pytest.mark.slow), pytest.param("export", marks=pytest.mark.slow)]
)
def test_kills_damage_nothing_and_leave_nothing(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _, kill in itertools.islice(kills.cases([kind]), 10):
        kills.run(kill, tmp_path)
    capfd.readouterr()

"""A few of the kills that `python -m tests.attack.kills` does by the thousand."""

from __future__ import annotations

import pytest

from tests.attack.kills import kill_often


@pytest.mark.parametrize(
    "kind", ["build", pytest.param("seal", marks=pytest.mark.slow), pytest.param("export", marks=pytest.mark.slow)]
)
def test_kills_damage_nothing_and_leave_nothing(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    report = kill_often(kind, 10)
    assert (report.kills, report.faults) == (10, [])
    capfd.readouterr()

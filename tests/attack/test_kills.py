"""A few of the kills that `make attack` does by the hundred."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path

import pytest

from tests.attack import kills
from tests.attack.judge import attack_in_test


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("build", 10),
        ("run", 4),
        pytest.param("seal", 10, marks=pytest.mark.slow),
        pytest.param("export", 10, marks=pytest.mark.slow),
    ],
)
def test_kills_damage_nothing_and_leave_nothing(
    kind: str, count: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _, kill in itertools.islice(kills.cases([kind]), count):
        attack_in_test(kills, kill, tmp_path)
    capfd.readouterr()


@pytest.mark.parametrize("place", ["cache", "temporary"])
def test_a_file_that_a_run_leaves_outside_its_folder_is_found(place: str, tmp_path: Path) -> None:
    class Litters(kills.Build):
        def prepare(self) -> None:
            """Import nothing."""

        def run(self) -> None:
            folder = Path(os.environ["LATENTRT_CACHE"]) if place == "cache" else Path(tempfile.gettempdir())
            folder.mkdir(exist_ok=True)
            (folder / f"{os.getpid()}").touch()

        def find_damage(self) -> str | None:
            return None

        def list_unknown(self) -> set[str]:
            return set()

    work = Litters(tmp_path / "place")
    with work.in_place():
        assert work.list_leftovers() == []
        work.run()
        assert work.list_leftovers() == [f"{place}/{os.getpid()}"]
        work.set_baseline()
        assert work.list_leftovers() == []
    assert os.environ.get("TMPDIR") != str(tmp_path / "place" / "temporary")

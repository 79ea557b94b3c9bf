"""A part of the checkpoints; `make attack` runs all of them."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.attack import checkpoints
from tests.attack.checkpoints import WEIGHTS, Case
from tests.attack.judge import attack_in_test

CASES = list(checkpoints.cases())


def test_there_are_enough_cases_and_none_twice() -> None:
    assert len(dict(CASES)) == len(CASES) >= 270


@pytest.mark.parametrize("file", [WEIGHTS, "unet/config.json"])
def test_the_files_that_they_change_are_accepted(tmp_path: Path, file: str) -> None:
    assert attack_in_test(checkpoints, Case(file, lambda former: former, foreign=False), tmp_path) is None
    with pytest.raises(AssertionError, match="accepts the file"):
        attack_in_test(checkpoints, Case(file, lambda former: former), tmp_path)


def test_some_files(tmp_path: Path) -> None:
    """All headers, and some of the JSON files."""
    for name, case in CASES:
        if case.file == WEIGHTS or zlib.crc32(name.encode()) % 24 == 0:
            error = attack_in_test(checkpoints, case, tmp_path)
            assert not case.foreign or error is not None, name

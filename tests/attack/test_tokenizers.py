"""A part of the tokenizers and texts; `make attack` runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack import tokenizers
from tests.attack.judge import attack_in_test
from tests.attack.tokenizers import Case

CASES = list(tokenizers.cases())


def test_there_are_enough_cases_and_none_twice() -> None:
    assert len(dict(CASES)) == len(CASES) >= 50


def test_the_file_that_they_change_is_read(tmp_path: Path) -> None:
    assert attack_in_test(tokenizers, Case(tokenizers.unchanged, foreign=False), tmp_path) is None
    with pytest.raises(AssertionError, match="reads the file"):
        attack_in_test(tokenizers, Case(tokenizers.unchanged), tmp_path)


def test_some_files_and_texts(tmp_path: Path) -> None:
    for name, case in CASES[::9]:
        error = attack_in_test(tokenizers, case, tmp_path)
        assert not case.foreign or error is not None, name

"""Whoever renames or writes files between check and use, or plants entries in the cache, changes no output.

`make test` runs each kind of attack at one moment; the slow test runs all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack import cache
from tests.attack.cache import Entry, Swap
from tests.attack.judge import attack_in_test

pytestmark = [pytest.mark.openvino, pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino")]
CASES = list(cache.cases())


def chosen() -> list[tuple[str, Swap | Entry]]:
    """Every kind of swap at one of its moments, in turn, and every entry."""
    swaps = [each for each in CASES if isinstance(each[1], Swap)]
    windows = len(cache.WINDOWS)
    turns = [each for index, each in enumerate(swaps) if index % windows == index // windows % windows]
    return turns + [each for each in CASES if isinstance(each[1], Entry)]


@pytest.mark.parametrize(("name", "case"), chosen(), ids=[name for name, _ in chosen()])
def test_an_attack_changes_no_output(name: str, case: Swap | Entry, tmp_path: Path) -> None:
    attack_in_test(cache, case, tmp_path)


@pytest.mark.slow
def test_no_attack_at_any_moment_changes_an_output(tmp_path: Path) -> None:
    for _, case in CASES:
        attack_in_test(cache, case, tmp_path)


def test_there_are_as_many_cases_as_are_promised() -> None:
    assert len({name for name, _ in CASES}) == len(CASES) >= 136

"""A part of the files of prompts; `make attack` runs all of them."""

from __future__ import annotations

from pathlib import Path

from tests.attack import prompts
from tests.attack.judge import attack_in_test
from tests.attack.prompts import Case

CASES = list(prompts.cases())


def test_a_harmless_file_is_generated(tmp_path: Path) -> None:
    assert attack_in_test(prompts, Case(lambda: b'{"prompt": "a", "width": 64}\n{"prompt": "b"}\n'), tmp_path) is None


def test_some_files(tmp_path: Path) -> None:
    assert len(dict(CASES)) == len(CASES)
    refused = [name for name, case in CASES[::41] if attack_in_test(prompts, case, tmp_path) is not None]
    assert len(refused) > len(CASES[::41]) / 2

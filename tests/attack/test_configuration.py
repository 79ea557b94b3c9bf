"""A part of the configuration files; `make attack` runs all of them."""

from __future__ import annotations

from pathlib import Path

from tests.attack import configuration
from tests.attack.judge import attack_in_test

CASES = list(configuration.cases())


def test_a_harmless_file_is_read(tmp_path: Path) -> None:
    assert attack_in_test(configuration, b"[run]\nsteps = 3\n", tmp_path) is None


def test_some_files(tmp_path: Path) -> None:
    assert len(dict(CASES)) == len(CASES)
    refused = [name for name, case in CASES[::29] if attack_in_test(configuration, case, tmp_path) is not None]
    assert len(refused) > len(CASES[::29]) / 2

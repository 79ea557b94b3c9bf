"""A part of the wrong manifests; `make attack` runs all of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.attack import manifest
from tests.attack.judge import attack_in_test

CASES = list(manifest.cases())


def test_there_are_enough_cases_and_none_twice() -> None:
    assert len({name for name, _ in CASES}) == len(CASES) >= 134


def test_the_manifest_that_they_change_generates_an_image(tmp_path: Path) -> None:
    assert attack_in_test(manifest, lambda tree: None, tmp_path) is None


def test_a_wrong_manifest_ends_in_an_error_of_ours_or_in_an_image(tmp_path: Path) -> None:
    """Most are refused when they are read. What the whole generates without is no fault: another name of a part."""
    endings = Counter(type(attack_in_test(manifest, case, tmp_path)).__name__ for _, case in CASES[:: len(CASES) // 80])
    assert endings["ManifestError"] > sum(endings.values()) / 2, endings

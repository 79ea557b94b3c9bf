"""Wrong values one at a time, and mutations: all are refused by latentrt's own errors, or accepted."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from latentrt.errors import LatentRTError
from tests.attack import mutations, values

# One of so many runs by default; `make attack` runs all.
EVERY = 12


def chosen(name: str) -> bool:
    return zlib.crc32(name.encode("utf-8", "surrogatepass")) % EVERY == 0


def refusal(case: values.Case, folder: Path) -> str | None:
    """Return the error that a case ends with, None if it succeeds; any other exception is a failure of the test."""
    try:
        values.run(case, folder)
    except LatentRTError as error:
        return str(error)
    return None


def test_a_sample_of_the_wrong_values(tmp_path: Path) -> None:
    cases = [case for name, case in values.cases() if chosen(name)]
    assert len(cases) > 40
    refused = [refusal(case, tmp_path) for case in cases]
    assert sum(each is not None for each in refused) > len(cases) / 2
    assert all(len(each) < 1500 for each in refused if each is not None)


@pytest.mark.slow
def test_all_wrong_values(tmp_path: Path) -> None:
    found = dict(values.cases())
    assert len(found) >= 460
    escaped = {}
    for name, case in found.items():
        try:
            refusal(case, tmp_path)
        except Exception as error:
            escaped[name] = f"{type(error).__name__}: {error}"
    assert escaped == {}


def test_mutations_of_manifests_and_requests() -> None:
    reports: list[str] = []
    assert mutations.search(1, 2000, reports.append) == 0, reports
    outcomes = {mutations.run(seed) for seed in range(1, 200)}
    assert {"accepted", "ManifestError", "RequestError"} <= outcomes, "the mutations reach all of it"

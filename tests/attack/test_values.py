"""Wrong values one at a time, hostile images, and mutations: latentrt's own errors refuse them, or all goes well."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from latentrt.errors import ManifestError, RequestError
from tests.attack import images, mutations, values
from tests.attack.judge import attack_in_test


def part(cases: Iterator[tuple[str, Any]], every: int) -> dict[str, Any]:
    """Return one of so many cases, always the same ones."""
    return {name: case for name, case in cases if zlib.crc32(name.encode("utf-8", "surrogatepass")) % every == 0}


def test_some_wrong_values(tmp_path: Path) -> None:
    chosen = part(values.cases(), 40)
    refused = [str(error) for case in chosen.values() if (error := attack_in_test(values, case, tmp_path)) is not None]
    assert len(chosen) > 60
    assert len(refused) > len(chosen) / 2
    assert max(map(len, refused)) < 2500


def test_some_images(tmp_path: Path) -> None:
    chosen = part(images.cases(), 3)
    refused = [error for case in chosen.values() if (error := attack_in_test(images, case, tmp_path)) is not None]
    assert len(chosen) > 25
    assert len(refused) > len(chosen) / 2


def test_mutations_of_manifests_and_requests(tmp_path: Path) -> None:
    endings = {type(attack_in_test(mutations, seed, tmp_path)) for seed in range(1, 1200)}
    assert {type(None), ManifestError, RequestError} <= endings, "the mutations reach all of it"


@pytest.mark.slow
@pytest.mark.parametrize(("module", "least"), [(values, 460), (images, 40)])
def test_all_cases(tmp_path: Path, module: Any, least: int) -> None:
    escaped, count = {}, 0
    for name, case in module.cases():
        count += 1
        try:
            attack_in_test(module, case, tmp_path)
        except Exception as error:
            escaped[name] = f"{type(error).__name__}: {error}"
    assert escaped == {}
    assert count >= least

"""The name of the sample bundle."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from latentrt import Bundle
from latentrt.bundle.sample import bundle_argument, bundle_path, find_bundle


def test_the_sample_bundle_has_a_name() -> None:
    assert find_bundle("sample") == bundle_path()
    assert Bundle.open(find_bundle("sample")).manifest.tasks


@pytest.mark.parametrize("path", ["./sample", "my-bundle", "Sample", Path("sample"), Path("a/sample")])
def test_every_other_text_and_every_path_is_a_folder(path: str | Path) -> None:
    assert find_bundle(path) == Path(path)


@pytest.mark.parametrize("path", [bundle_path(), Path("sample"), Path("a/sample"), Path("my bundle")])
def test_a_bundle_is_named_so_that_it_is_found(path: Path) -> None:
    (name,) = shlex.split(bundle_argument(path))
    assert find_bundle(name) == path

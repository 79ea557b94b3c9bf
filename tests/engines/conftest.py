"""What the tests of engines share."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.bundle import Bundle
from latentrt.sample import bundle_path
from latentrt_engines.cache import EngineCache


@pytest.fixture
def sample() -> Bundle:
    return Bundle.open(bundle_path())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """An empty cache, the one that commands find too."""
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return EngineCache()

"""Fixtures of the runtime's tests, which run without torch, the exporter or an engine library (`make test-runtime`)."""

from __future__ import annotations

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path


@pytest.fixture
def bundle() -> Bundle:
    """The sample bundle; a test may change its manifest."""
    return Bundle.open(bundle_path())

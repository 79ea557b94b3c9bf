"""Fixtures of the tests of engines."""

from __future__ import annotations

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path


@pytest.fixture
def sample() -> Bundle:
    return Bundle.open(bundle_path())

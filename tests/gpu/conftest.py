"""Fixtures of the tests that need a GPU."""

from __future__ import annotations

import pytest

from latentrt.engines.gpu import Gpu, NoGpu, find_gpu


@pytest.fixture
def gpu() -> Gpu:
    """The GPU of this machine."""
    found = find_gpu()
    if isinstance(found, NoGpu):
        pytest.skip(f"needs a GPU: {found.reason}")
    return found

"""Fixtures of the runtime's tests, which run without torch, the exporter or an engine library (`make test-runtime`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path

if TYPE_CHECKING:
    from tests.runtime.backends.fake_cuda import FakeCudaApi


@pytest.fixture
def bundle() -> Bundle:
    """The sample bundle; a test may change its manifest."""
    return Bundle.open(bundle_path())


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeCudaApi:
    """An RTX 4090 with TensorRT-RTX."""
    from tests.engines import made_up
    from tests.runtime.backends.made_up_machine import with_gpu

    return with_gpu(monkeypatch, made_up.RTX4090)

"""Fixtures of the backends' tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.runtime.backends.fake_cuda import FakeCudaApi


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeCudaApi:
    """An RTX 4090 with TensorRT-RTX."""
    from tests.engines import made_up
    from tests.runtime.backends.made_up_machine import with_gpu

    return with_gpu(monkeypatch, made_up.RTX4090)

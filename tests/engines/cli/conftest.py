from __future__ import annotations

import pytest

from tests.engines.cli.calling import Caller


@pytest.fixture
def latentrt(capsys: pytest.CaptureFixture[str]) -> Caller:
    return Caller(capsys)

"""Fixtures of the runtime's tests, which run without torch, the exporter or an engine library (`make test-runtime`)."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path

# Modules of tests that compare with a library that is no dependency of the runtime; they run where it is installed.
_COMPARED_WITH = {
    "bundle/test_manifest.py": "jsonschema",
    "bundle/test_weights.py": "safetensors",
    "cli/test_schedule_plot.py": "matplotlib",
}
collect_ignore = [path for path, module in _COMPARED_WITH.items() if find_spec(module) is None]


@pytest.fixture
def bundle() -> Bundle:
    """The sample bundle; a test may change its manifest."""
    return Bundle.open(bundle_path())

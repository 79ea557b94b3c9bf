"""Fixtures of the runtime's tests, which run without torch, the exporter or an engine library (`make test-runtime`)."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path

# Modules of tests that compare with a library that is no dependency of the runtime; they run where it is installed.
_COMPARED_WITH = {
    "bundle/test_manifest.py": "jsonschema",
    "bundle/test_weights.py": "safetensors",
    "cli/test_schedule_plot.py": "matplotlib",
    "cli/test_schemas.py": "jsonschema",
}
collect_ignore = [path for path, module in _COMPARED_WITH.items() if find_spec(module) is None]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests that `make test-runtime` runs, where `make test` ran it before."""
    if not os.environ.get("LATENTRT_TEST_WITHOUT_RUNTIME"):
        return
    folder = Path(__file__).parent
    compared = {folder / path for path in _COMPARED_WITH}
    ran = {
        item
        for item in items
        if item.path.is_relative_to(folder)
        and item.path not in compared
        and not any(item.get_closest_marker(name) for name in ("openvino", "extras"))
    }
    config.hook.pytest_deselected(items=list(ran))
    items[:] = [item for item in items if item not in ran]


@pytest.fixture
def bundle() -> Bundle:
    """The sample bundle; a test may change its manifest."""
    return Bundle.open(bundle_path())

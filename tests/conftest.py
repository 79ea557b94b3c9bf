"""Fixtures and settings of all tests."""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from latentrt.telemetry import opt_out

if TYPE_CHECKING:
    from latentrt_engines.cache import EngineCache
    from tests.exported import Exported
    from tests.hub_server import HubServer

# No test reports to the maker of a library.
opt_out()
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

# Fixtures import the exporter and the engine builder when they are used: the runtime's tests run without either.


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the cache of whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTRT_CACHE", str(tmp_path_factory.mktemp("cache") / "latentrt"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Restore ctrl-C: a shell's background processes ignore SIGINT, and their children inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny Stable Diffusion 1.x, exported in float32, with a part for DeepCache."""
    from tests.exported import exported

    return exported(tmp_path_factory, "sd1")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny Stable Diffusion 2.x with half weights, exported in float16."""
    from tests.exported import exported

    return exported(tmp_path_factory, "sd2")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure: what cannot run there is deselected by its marker, so that nothing is skipped
    unseen."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("tests were skipped, and in CI every selected test has to run", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    """An empty cache, the one that commands find too."""
    from latentrt_engines.cache import EngineCache

    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return EngineCache()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A server in the place of the Hugging Face hub, with an empty cache and no token; retries do not wait."""
    import huggingface_hub
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    from tests.hub_server import hub_environment, serve_hub

    impatient = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(_http, "time", impatient)
    monkeypatch.setattr(file_download, "time", impatient)
    with serve_hub() as server:
        home = tmp_path / "hub-home"
        for name, value in hub_environment(server, home).items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        # The library reads its variables when it is imported.
        for name, constant in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }.items():
            monkeypatch.setattr(constants, name, constant)
        yield server
        huggingface_hub.close_session()

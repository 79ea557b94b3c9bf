"""`latentrt pull` and `latentrt push`, and the hint at the first where a bundle is named that is not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from latentrt.bundle.bundle import Bundle
from tests.hub_server import TOKEN, hub_environment
from tests.runtime.cli.conftest import Caller
from tests.runtime.small_bundle import FILES, write_bundle

if TYPE_CHECKING:
    from tests.hub_server import HubServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "made")


@pytest.mark.extras
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_round_trip(
    hub: HubServer, latentrt: Caller, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    digest = Bundle.open(folder).digest
    done = latentrt("push", folder, "owner/name", "--private", "--revision", "v1")
    assert (done.code, done.err) == (0, "")
    assert f"latentrt pull owner/name BUNDLE --digest {digest}" in done.out
    done = latentrt("pull", "owner/name", tmp_path / "pulled", "--revision", "v1", "--digest", digest)
    assert done.code == 0
    assert f"digest: {digest}" in done.out
    assert TOKEN not in done.out + done.err
    done = latentrt("pull", "hf://owner/name@v1", tmp_path / "pulled", "--overwrite", "--json")
    result = json.loads(done.out)
    assert (result["digest"], result["files"]) == (digest, len(FILES))
    done = latentrt("push", folder, "owner/name", "--json")
    assert json.loads(done.out)["commit"] == hub.repositories["owner/name"].refs["main"]


@pytest.mark.extras
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("pull", "owner", "OUT"), 2, "REPOSITORY: got 'owner', expected a repository on the hub"),
        (("pull", "./owner/name", "OUT"), 2, "OWNER/NAME"),
        (("pull", "owner/name@v1", "OUT", "--revision", "v2"), 2, "--revision: got 'v2'"),
        (("pull", "owner/name/bundle.json", "OUT"), 2, "OWNER/NAME"),
        (("pull", "owner/name", "OUT", "--revision", "../x"), 2, "--revision: got '../x'"),
        (("pull", "owner/none", "OUT"), 10, "the hub has no repository owner/none"),
        (("pull", "owner/checkpoint", "OUT"), 4, "latentrt export owner/checkpoint"),
        (("pull", "owner/checkpoint", "OUT", "--digest", "0"), 2, "--digest"),
        (("push", "nowhere", "owner/name"), 4, "nowhere"),
        (("push", "BUNDLE", "owner/name"), 10, "HF_TOKEN"),
    ],
)
def test_errors(
    hub: HubServer,
    latentrt: Caller,
    folder: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    hub.add("owner/checkpoint", {"model_index.json": b"{}"})
    places = {"OUT": str(tmp_path / "pulled"), "BUNDLE": str(folder)}
    done = latentrt(*(places.get(each, each) for each in arguments))
    assert done.code == code, done.err
    assert words in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "pulled").exists()


@pytest.mark.extras
def test_variables_of_the_environment(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """The library reads them when it is imported, so this takes a process of its own."""
    hub.add("owner/name", folder).private = True
    environment = {**hub_environment(hub, tmp_path / "home"), "HF_TOKEN": TOKEN, "PATH": "", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "latentrt", "--debug", "pull", "owner/name", str(tmp_path / "pulled")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "next: latentrt run" in done.stdout
    # The library would report the installed packages, and look up a list of programs that call it.
    assert all(each.path.startswith(("/api/models/owner/name", "/owner/name/", "/cdn/")) for each in hub.seen)
    done = subprocess.run(
        [*command[:-1], str(tmp_path / "again")],
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_TOKEN": "hf_secret"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 10
    assert "offline mode" in done.stderr.splitlines()[-1]
    assert "hf_secret" not in done.stderr


@pytest.mark.parametrize("name", ["owner/name", "hf://owner/name@v1"])
def test_run_of_a_repository_hints_at_pull(latentrt: Caller, name: str) -> None:
    done = latentrt("run", name, "a circle")
    assert done.code == 4
    assert f"latentrt pull {name} BUNDLE" in done.err


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "https://example.org/x"])
def test_run_of_another_missing_folder_does_not(latentrt: Caller, name: str) -> None:
    assert "latentrt pull" not in latentrt("run", name, "a circle").err

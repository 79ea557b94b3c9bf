from __future__ import annotations

import logging
import os
import pwd
import stat
from pathlib import Path

import platformdirs
import pytest

from latentrt.bundle.user_cache import cache_root, private_folder


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_variables_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LATENTRT_CACHE", "/chosen")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/chosen")
    monkeypatch.setenv("LATENTRT_CACHE", "")
    assert cache_root() == Path("/xdg/latentrt")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root() == tmp_path / ".cache" / "latentrt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == tmp_path / ".cache" / "latentrt"


@pytest.mark.parametrize("found", [Path("~/.cache/latentrt"), ValueError("Unset environment variable"), RuntimeError()])
def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch, found: Path | Exception) -> None:
    def homeless(*_: object, **__: object) -> Path:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.delenv("LATENTRT_CACHE")
    monkeypatch.setattr(platformdirs, "user_cache_path", homeless)
    assert cache_root() is None
    assert private_folder("digests") is None


@pytest.mark.parametrize("home", ["", "relative"])
def test_a_home_that_is_no_place_is_not_used(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    """It would be the root of the file system, or a folder of whichever folder a command runs in."""
    for name in ("LATENTRT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", home)
    assert cache_root() in (None, Path(pwd.getpwuid(os.geteuid()).pw_dir) / ".cache" / "latentrt")


def test_created_folders_are_private(root: Path) -> None:
    assert private_folder("digests") == root / "digests"
    assert private_folder("digests") == root / "digests"
    for folder in (root, root / "digests"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701, 0o1777])
@pytest.mark.parametrize("name", ["", "digests"])
def test_a_folder_that_is_open_to_others_is_not_used(root: Path, mode: int, name: str) -> None:
    assert private_folder("digests")
    (root / name).chmod(mode)
    assert private_folder("digests") is None
    assert stat.S_IMODE((root / name).stat().st_mode) == mode


def test_a_named_folder_that_is_not_used_is_a_warning_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root.mkdir(mode=0o755)
    with caplog.at_level(logging.INFO, "latentrt"):
        assert [private_folder(name) for name in ("digests", "compiled")] == [None, None]
        monkeypatch.delenv("LATENTRT_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(root.parent))
        (root.parent / "latentrt").mkdir(mode=0o755)
        assert private_folder("digests") is None
    found = [(record.levelname, record.message.partition(" is open to others ")[0]) for record in caplog.records]
    assert found == [
        ("WARNING", f"nothing is cached: {root}"),
        ("INFO", f"nothing is cached: {root.parent / 'latentrt'}"),
    ]


def test_a_folder_of_somebody_else_is_not_used(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert private_folder("digests")
    somebody = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: somebody)
    assert private_folder("digests") is None


def test_a_link_to_a_folder_is_not_followed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    root.mkdir(mode=0o700)
    (root / "digests").symlink_to(tmp_path / "elsewhere")
    assert private_folder("digests") is None


def test_a_cache_that_cannot_be_created_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Holds for root too, whom no permission stops: a file is not a folder.
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "file" / "cache"))
    assert private_folder("digests") is None

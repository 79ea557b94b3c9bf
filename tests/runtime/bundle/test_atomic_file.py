from __future__ import annotations

import os
import signal
import stat
import time
from pathlib import Path

import pytest

from latentrt.bundle import atomic_file, file_lock
from latentrt.bundle.atomic_file import find_abandoned_drafts, write_atomically
from latentrt.bundle.file_lock import LockedFile, create_locked
from tests.killed import in_child, start_child


@pytest.fixture(autouse=True)
def _fresh_process() -> None:
    """Have each test look for drafts, as a new process does."""
    atomic_file._remove_drafts_once.cache_clear()


def test_a_new_file_and_a_replaced_one(tmp_path: Path) -> None:
    for data in (b"first", b"second"):
        write_atomically(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
    assert [place.name for place in tmp_path.iterdir()] == ["file"]


def test_the_umask_counts(tmp_path: Path) -> None:
    (tmp_path / "open").touch()
    write_atomically(tmp_path / "file", b"")
    write_atomically(tmp_path / "private", b"", mode=0o600)
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "open").stat().st_mode
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder/file")
    write_atomically(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_bytes() == b"data"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_the_earlier_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    (tmp_path / "file").write_bytes(b"earlier")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"earlier"
    assert len(list(tmp_path.iterdir())) == 1


# What killed processes leave


def leave_draft(folder: Path) -> Path:
    """Have a process killed before the rename; return its draft."""

    def be_killed() -> None:
        os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write_atomically(folder / "cat.png", b"new")

    before = set(folder.iterdir())
    assert in_child(be_killed) == -signal.SIGKILL
    (draft,) = set(folder.iterdir()) - before
    return draft


def test_a_process_that_is_killed_at_any_step(tmp_path: Path) -> None:
    """Before the file is opened, while it is a draft, before the rename and after it: then a run leaves one file."""
    status, step = -signal.SIGKILL, 0
    while status:
        (tmp_path / "cat.png").write_bytes(b"earlier")
        status = in_child(lambda: write_atomically(tmp_path / "cat.png", b"new"), kill_at=step)
        assert (tmp_path / "cat.png").read_bytes() == (b"new" if status == 0 else b"earlier")
        in_child(lambda: write_atomically(tmp_path / "dog.png", b"next"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["cat.png", "dog.png"]
        step += 1
    assert step > 2, "else it was never killed"


def test_the_next_write_to_the_folder_removes_a_draft(tmp_path: Path) -> None:
    draft = leave_draft(tmp_path)
    assert find_abandoned_drafts(tmp_path) == [draft]
    write_atomically(tmp_path / "dog.png", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["dog.png"]


def test_the_draft_of_a_running_process_is_kept(tmp_path: Path) -> None:
    said, saying = os.pipe()

    def wait_before_the_rename() -> None:
        replace = os.replace

        def wait(*names: Path) -> None:
            os.write(saying, b"x")
            time.sleep(60)
            replace(*names)

        os.replace = wait  # type: ignore[assignment]
        write_atomically(tmp_path / "cat.png", b"slow")

    child = start_child(wait_before_the_rename)
    os.read(said, 1)
    (draft,) = tmp_path.iterdir()
    write_atomically(tmp_path / "dog.png", b"")
    assert draft.exists()
    assert find_abandoned_drafts(tmp_path) == []
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert find_abandoned_drafts(tmp_path) == [draft]


@pytest.mark.parametrize("kind", ["another name", "a folder", "a link", "a pipe", "another user's"])
def test_files_of_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    name = tmp_path / f".cat.png.{'0' * 16}.latentrt-draft"
    if kind == "another name":
        name = tmp_path / f".cat.png.{'0' * 16}"
    if kind == "a folder":
        name.mkdir()
    elif kind == "a link":
        (tmp_path / "real").touch()
        name.symlink_to("real")
    elif kind == "a pipe":
        os.mkfifo(name)
    else:
        name.touch()
    if kind == "another user's":
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    write_atomically(tmp_path / "dog.png", b"")
    assert os.path.lexists(name)


def test_a_folder_of_many_files_is_listed_once_and_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "_MAX_ENTRIES", 5)
    for number in range(20):
        (tmp_path / f".{number}.{'0' * 16}.latentrt-draft").touch()
    for _ in range(3):
        write_atomically(tmp_path / "dog.png", b"")
    assert len(list(tmp_path.iterdir())) == 20 - 5 + 1


def test_a_draft_that_is_taken_for_a_leftover_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the making of the file and its lock another process may remove it."""
    tries = list[Path]()

    def taken_once(path: Path, mode: int) -> LockedFile | None:
        tries.append(path)
        return create_locked(path, mode) if len(tries) > 1 else None

    monkeypatch.setattr(atomic_file, "create_locked", taken_once)
    write_atomically(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"
    assert len(set(tries)) == 2

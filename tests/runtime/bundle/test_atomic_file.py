from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from latentrt.bundle.atomic_file import write_atomically


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

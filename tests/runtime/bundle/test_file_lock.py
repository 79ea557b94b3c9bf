from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from latentrt.bundle.file_lock import claim, create_locked


def test_a_locked_file_cannot_be_claimed(tmp_path: Path) -> None:
    descriptor = create_locked(tmp_path / "file")
    assert descriptor is not None
    with claim(tmp_path / "file") as abandoned:
        assert not abandoned
    descriptor.close()
    with claim(tmp_path / "file") as abandoned:
        assert abandoned
        with claim(tmp_path / "file") as twice:
            assert not twice


def test_a_missing_file_cannot_be_claimed(tmp_path: Path) -> None:
    with claim(tmp_path / "file") as abandoned:
        assert not abandoned


def test_an_existing_file_is_not_locked_anew(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        create_locked(tmp_path / "file")


@pytest.mark.parametrize("claimed_by", ["one who removes it", "one who has it locked"])
def test_a_file_that_is_claimed_before_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claimed_by: str
) -> None:
    path, flock, others = tmp_path / "file", fcntl.flock, list[int]()

    def claim_first(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        if claimed_by == "one who removes it":
            path.unlink()
        else:
            others.append(os.open(path, os.O_RDWR))
            flock(others[0], operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", claim_first)
    assert create_locked(path) is None
    assert not path.exists()
    for other in others:
        os.close(other)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written, and none counts as left behind."""

    def fail(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", fail)
    descriptor = create_locked(tmp_path / "file")
    assert descriptor is not None
    descriptor.close()
    with claim(tmp_path / "file") as abandoned:
        assert not abandoned

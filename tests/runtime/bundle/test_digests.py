from __future__ import annotations

import hashlib
import os
import socket
import tracemalloc
from pathlib import Path

import pytest

from latentrt.bundle.digests import file_record, hash_bytes, hash_stream, open_regular, read_at_most
from latentrt.bundle.manifest import FileRecord


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (3 << 20) + 5])
def test_a_file_has_the_digest_that_hashlib_gives(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    assert file_record(tmp_path / "file") == FileRecord(sha256=hashlib.sha256(data).hexdigest(), size=size)
    assert hash_bytes(data) == hashlib.sha256(data).hexdigest()


def test_progress_adds_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes((2 << 20) + 3))
    counts: list[int] = []
    with open_regular(tmp_path / "file") as stream:
        hash_stream(stream, counts.append)
    assert sum(counts) == (2 << 20) + 3
    assert len(counts) == 3


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(OSError, match=r"No such device|not supported"):
            open_regular("socket")


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "pipe")


def test_a_reader_asks_for_no_more_than_the_file_has(tmp_path: Path) -> None:
    """A stream that is asked for a GiB allocates a GiB first."""
    (tmp_path / "file").write_bytes(b"12345")
    tracemalloc.start()
    try:
        for most, expected in ((1 << 30, b"12345"), (5, b"12345"), (4, b"12345"), (3, b"1234"), (0, b"1")):
            with open_regular(tmp_path / "file") as stream:
                assert read_at_most(stream, most) == expected
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("place", ["/dev/zero", "/"])
def test_a_device_or_a_folder_is_refused(place: str) -> None:
    with pytest.raises(OSError, match=r"not a regular file|Is a directory"):
        open_regular(place)

from __future__ import annotations

import os
import stat
import time
from io import BufferedReader
from pathlib import Path

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import ByteProgress, hash_stream
from latentrt.errors import IntegrityError
from tests.runtime.small_bundle import FILES, WEIGHTS, change_byte, everything, write_bundle

HOUR_NS = 3600 * 10**9


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests"


@pytest.fixture
def folder(tmp_path: Path, cache: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def an_hour_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can set a file's ctime back, so the clock goes forward."""
    clock = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: clock() + HOUR_NS)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were hashed, by name."""
    names: list[str] = []

    def recording(stream: BufferedReader, progress: ByteProgress | None = None) -> tuple[str, int]:
        names.append(str(stream.name))
        return hash_stream(stream, progress)

    monkeypatch.setattr("latentrt.bundle.pinned_files.hash_stream", recording)
    return names


def load(folder: Path, hashed: list[str]) -> bool:
    """Load the weights as a new process would; return whether they were hashed."""
    hashed.clear()
    Bundle.open(folder).path(WEIGHTS)
    return bool(hashed)


def only_record(cache: Path) -> Path:
    (record,) = cache.iterdir()
    return record


@pytest.mark.usefixtures("an_hour_later")
def test_a_second_load_does_not_hash(folder: Path, hashed: list[str]) -> None:
    assert load(folder, hashed)
    assert not load(folder, hashed)


@pytest.mark.usefixtures("an_hour_later")
def test_a_changed_byte_with_a_restored_mtime_is_caught(folder: Path, hashed: list[str]) -> None:
    load(folder, hashed)
    before = (folder / WEIGHTS).stat()
    change_byte(folder / WEIGHTS)
    os.utime(folder / WEIGHTS, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (folder / WEIGHTS).stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (before.st_ino, before.st_size, before.st_mtime_ns)
    with pytest.raises(IntegrityError, match=WEIGHTS):
        load(folder, hashed)


@pytest.mark.usefixtures("an_hour_later")
def test_a_file_that_takes_the_place_of_another_is_hashed(folder: Path, hashed: list[str]) -> None:
    load(folder, hashed)
    before = (folder / WEIGHTS).stat()
    (folder / "other").write_bytes(b"v" + FILES[WEIGHTS][1:])
    os.utime(folder / "other", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "other").replace(folder / WEIGHTS)
    with pytest.raises(IntegrityError, match=WEIGHTS):
        load(folder, hashed)


def test_a_file_that_changed_just_now_is_not_remembered(folder: Path, cache: Path, hashed: list[str]) -> None:
    assert load(folder, hashed)
    assert not list(cache.iterdir())
    assert load(folder, hashed)


@pytest.mark.usefixtures("an_hour_later")
def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(stream: BufferedReader, progress: ByteProgress | None = None) -> tuple[str, int]:
        answer = hash_stream(stream, progress)
        os.utime(folder / WEIGHTS)
        return answer

    monkeypatch.setattr("latentrt.bundle.pinned_files.hash_stream", slow)
    Bundle.open(folder).path(WEIGHTS)
    assert not list(cache.iterdir())


@pytest.mark.usefixtures("an_hour_later")
def test_small_files_are_hashed_each_time(folder: Path, cache: Path, hashed: list[str]) -> None:
    everything(Bundle.open(folder))
    assert len(list(cache.iterdir())) == 1
    hashed.clear()
    everything(Bundle.open(folder))
    assert len(hashed) == len(FILES) - 1


@pytest.mark.usefixtures("an_hour_later")
@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
def test_a_file_that_others_may_write_is_not_trusted(folder: Path, cache: Path, hashed: list[str], mode: int) -> None:
    (folder / WEIGHTS).chmod(mode)
    assert load(folder, hashed)
    assert not list(cache.iterdir())
    assert load(folder, hashed)


@pytest.mark.usefixtures("an_hour_later")
def test_a_file_of_another_user_is_not_trusted(
    folder: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder, hashed)
    record = only_record(cache)
    # The same record, and a file that is the same but for its owner.
    original = os.fstat

    def of_another(descriptor: int) -> os.stat_result:
        found = list(original(descriptor))
        found[stat.ST_UID] = 4242
        return os.stat_result(
            found, {name: getattr(original(descriptor), name) for name in ("st_mtime_ns", "st_ctime_ns")}
        )

    monkeypatch.setattr(os, "fstat", of_another)
    assert load(folder, hashed)
    assert record.exists()


@pytest.mark.usefixtures("an_hour_later")
@pytest.mark.parametrize(
    "garbage",
    [b"", b"{", b"null", b"\xff\xfe", b'{"sha256": 3}', b"[" * 5000, b'{"state":{},"sha256":"","more":1}'],
)
def test_a_corrupt_record_is_ignored_and_written_anew(
    folder: Path, cache: Path, hashed: list[str], garbage: bytes
) -> None:
    load(folder, hashed)
    only_record(cache).write_bytes(garbage)
    assert load(folder, hashed)
    assert not load(folder, hashed)


@pytest.mark.usefixtures("an_hour_later")
def test_a_record_with_the_wrong_digest_can_only_refuse(folder: Path, cache: Path, hashed: list[str]) -> None:
    load(folder, hashed)
    record = only_record(cache)
    record.write_bytes(record.read_bytes().replace(b'"sha256":"', b'"sha256":"0')[:-3] + b'"}')
    with pytest.raises(IntegrityError, match=WEIGHTS):
        load(folder, hashed)


@pytest.mark.usefixtures("an_hour_later")
def test_a_record_that_others_may_write_is_ignored(folder: Path, cache: Path, hashed: list[str]) -> None:
    load(folder, hashed)
    only_record(cache).chmod(0o622)
    assert load(folder, hashed)


@pytest.mark.usefixtures("an_hour_later")
def test_a_record_that_is_a_link_is_ignored(folder: Path, cache: Path, hashed: list[str], tmp_path: Path) -> None:
    load(folder, hashed)
    record = only_record(cache)
    record.rename(tmp_path / "record")
    record.symlink_to(tmp_path / "record")
    assert load(folder, hashed)


@pytest.mark.usefixtures("an_hour_later")
@pytest.mark.parametrize("level", ["cache", "digests"])
def test_a_cache_that_is_open_to_others_is_ignored(folder: Path, cache: Path, hashed: list[str], level: str) -> None:
    load(folder, hashed)
    (cache if level == "digests" else cache.parent).chmod(0o755)
    assert load(folder, hashed)


@pytest.mark.usefixtures("an_hour_later")
def test_records_are_private(folder: Path, cache: Path, hashed: list[str]) -> None:
    load(folder, hashed)
    assert stat.S_IMODE(only_record(cache).stat().st_mode) == 0o600


@pytest.mark.usefixtures("an_hour_later")
def test_a_cache_that_cannot_be_written_is_ignored(
    folder: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "file" / "cache"))
    assert load(folder, hashed)
    assert load(folder, hashed)


@pytest.mark.usefixtures("an_hour_later")
def test_a_full_disk_is_ignored(folder: Path, cache: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert load(folder, hashed)
    assert not list(cache.iterdir())


@pytest.mark.usefixtures("an_hour_later")
def test_verify_hashes_files_whose_digests_are_cached_too(folder: Path, hashed: list[str]) -> None:
    load(folder, hashed)
    hashed.clear()
    Bundle.open(folder).verify()
    assert len(hashed) == len(FILES)


@pytest.mark.usefixtures("an_hour_later")
def test_the_cache_is_not_used_without_trust(folder: Path, cache: Path, hashed: list[str]) -> None:
    Bundle.open(folder, trust_cache=False).path(WEIGHTS)
    assert not cache.exists()
    load(folder, hashed)
    hashed.clear()
    Bundle.open(folder, trust_cache=False).path(WEIGHTS)
    assert hashed

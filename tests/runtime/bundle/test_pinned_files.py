from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path

import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import ByteProgress, hash_stream
from latentrt.errors import BundleError, IntegrityError
from tests.runtime.small_bundle import FILES, WEIGHTS, WEIGHTS_BYTES, change_byte, enlarge, everything, write_bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def hashed_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names: list[str] = []

    def recording(stream: BufferedReader, progress: ByteProgress | None = None) -> tuple[str, int]:
        names.append(Path(stream.name).name)
        return hash_stream(stream, progress)

    monkeypatch.setattr("latentrt.bundle.pinned_files.hash_stream", recording)
    return names


def reader(bundle: Bundle) -> Callable[[str], bytes]:
    """Return `bundle.read` with a bound that fits every file."""
    return lambda name: bundle.read(name, WEIGHTS_BYTES)


@pytest.mark.parametrize("name", FILES)
def test_a_good_file_is_handed_out(folder: Path, name: str) -> None:
    bundle = Bundle.open(folder)
    assert bundle.path(name).read_bytes() == FILES[name]
    assert bundle.read(name, len(FILES[name])) == FILES[name]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_is_caught(folder: Path, name: str) -> None:
    change_byte(folder / name)
    bundle = Bundle.open(folder)
    for ask in (bundle.path, reader(bundle), lambda name: bundle.check([name])):
        with pytest.raises(IntegrityError, match=rf"{name} has SHA-256 .*, expected .*\n.*latentrt export"):
            ask(name)
    with pytest.raises(IntegrityError, match=name):
        bundle.verify()


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    bundle = Bundle.open(folder)
    for ask in (bundle.path, reader(bundle)):
        with pytest.raises(IntegrityError, match=f"{name} is missing"):
            ask(name)


def test_a_file_larger_than_its_reader_can_use_is_neither_read_nor_hashed(folder: Path) -> None:
    enlarge(folder, "LICENSE", 1 << 40)
    with pytest.raises(BundleError, match="LICENSE has 1,099,511,627,776 bytes, expected at most 1,000"):
        Bundle.open(folder).read("LICENSE", 1000)


@pytest.mark.parametrize("cut", [1, 100_000])
def test_a_truncated_file_is_caught_without_hashing_it(folder: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(folder / WEIGHTS, len(FILES[WEIGHTS]) - cut)
    hashed = hashed_files(monkeypatch)
    with pytest.raises(IntegrityError, match=r"unet/model.safetensors has .* bytes, expected 1,048,583"):
        Bundle.open(folder, trust_cache=False).path(WEIGHTS)
    assert not hashed


def test_bytes_after_the_end_are_caught(folder: Path) -> None:
    with (folder / WEIGHTS).open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(IntegrityError, match="expected 1,048,583"):
        Bundle.open(folder).path(WEIGHTS)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_a_pipe_or_folder_is_refused_without_waiting(folder: Path, make: object) -> None:
    (folder / WEIGHTS).unlink()
    make(folder / WEIGHTS)  # type: ignore[operator]
    with pytest.raises(IntegrityError, match=r"not a regular file|Is a directory"):
        Bundle.open(folder).path(WEIGHTS)


def test_a_file_that_fails_while_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> tuple[str, int]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("latentrt.bundle.pinned_files.hash_stream", failing)
    with pytest.raises(IntegrityError, match=r"unet/model\.safetensors cannot be read: Input/output error"):
        Bundle.open(folder).path(WEIGHTS)


def test_every_bad_file_is_listed(folder: Path) -> None:
    change_byte(folder / WEIGHTS)
    change_byte(folder / "LICENSE")
    (folder / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(IntegrityError, match="wrong, 3 of 10 files compared") as caught:
        Bundle.open(folder).verify()
    assert all(name in str(caught.value) for name in (WEIGHTS, "LICENSE", "tokenizer/tokenizer.json"))
    with pytest.raises(IntegrityError, match="wrong, 3 of 10 files compared"):
        everything(Bundle.open(folder))


def test_a_file_that_is_not_requested_is_not_hashed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_byte(folder / WEIGHTS)
    hashed = hashed_files(monkeypatch)
    Bundle.open(folder).path("LICENSE")
    assert hashed == ["LICENSE"]


def test_a_file_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = hashed_files(monkeypatch)
    bundle = Bundle.open(folder, trust_cache=False)
    for _ in range(3):
        bundle.path(WEIGHTS)
    bundle.check([WEIGHTS, WEIGHTS])
    assert hashed == ["model.safetensors"]


def test_a_file_that_changes_later_is_caught(folder: Path) -> None:
    bundle = Bundle.open(folder)
    bundle.path(WEIGHTS)
    change_byte(folder / WEIGHTS)
    with pytest.raises(IntegrityError, match=WEIGHTS):
        bundle.path(WEIGHTS)


def test_a_file_that_is_swapped_for_a_link_later_is_caught(folder: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(folder)
    bundle.path(WEIGHTS)
    (tmp_path / "copy").write_bytes(FILES[WEIGHTS])
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(tmp_path / "copy")
    with pytest.raises(IntegrityError, match="leads to"):
        bundle.path(WEIGHTS)


@pytest.mark.parametrize("name", ["unet/model.bin", "bundle.json", "../bundle/LICENSE", ""])
def test_a_file_that_the_manifest_does_not_name(folder: Path, name: str) -> None:
    bundle = Bundle.open(folder)
    for ask in (bundle.path, reader(bundle)):
        with pytest.raises(BundleError, match="has no file"):
            ask(name)


def test_verify_reports_every_byte_from_one_thread_at_a_time(folder: Path) -> None:
    counts: list[int] = []
    inside = threading.Lock()

    def progress(count: int) -> None:
        assert inside.acquire(blocking=False)
        counts.append(count)
        inside.release()

    Bundle.open(folder).verify(progress)
    assert sum(counts) == sum(map(len, FILES.values()))


def test_weights_are_those_that_were_hashed_whatever_takes_their_place(folder: Path) -> None:
    bundle = Bundle.open(folder)
    with bundle.weights("vae_decoder") as weights:
        (folder / "vae_decoder").rename(folder / "moved")
        (folder / "vae_decoder").mkdir()
        (folder / "vae_decoder/model.safetensors").write_bytes(b"other")
        assert weights.data().tobytes() == FILES["vae_decoder/model.safetensors"]
        assert weights.size == len(FILES["vae_decoder/model.safetensors"])
    assert weights.digest == bundle.manifest.files["vae_decoder/model.safetensors"].sha256
    assert weights.stream.closed


@pytest.mark.parametrize("restores_mtime", [False, True])
def test_weights_that_are_written_to_while_they_are_loaded_are_refused(folder: Path, restores_mtime: bool) -> None:
    place = folder / "vae_decoder/model.safetensors"
    right, before = place.read_bytes(), place.stat()
    bundle = Bundle.open(folder)
    time.sleep(0.02)  # until the file system's clock has moved on

    def load() -> None:
        with bundle.weights("vae_decoder"):
            change_byte(place)
            place.write_bytes(right)
            if restores_mtime:
                os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(IntegrityError, match="while it was being loaded"):
        load()
    with bundle.weights("vae_decoder") as weights:  # which are hashed again, and intact
        assert weights.data().tobytes() == right


def test_an_error_within_the_block_is_the_one_that_is_raised(folder: Path) -> None:
    def fail() -> None:
        with Bundle.open(folder).weights("unet"):
            change_byte(folder / WEIGHTS)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()


@pytest.mark.parametrize("damage", [change_byte, Path.unlink, lambda place: place.write_bytes(b"short")])
def test_damaged_weights_are_not_opened(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder / WEIGHTS)
    with pytest.raises(IntegrityError, match="wrong, 1 of 1 files compared"), Bundle.open(folder).weights("unet"):
        pass

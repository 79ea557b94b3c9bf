from __future__ import annotations

import os
import resource
import stat
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt.errors import OutputError, RequestError
from latentrt.images.files import check_output, open_picture, save, to_pictures

EXTENSIONS = ["png", "jpg", "jpeg", "webp", "PNG"]


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)


@pytest.fixture
def picture(pixels: NDArray[np.uint8]) -> Image.Image:
    return to_pictures(pixels)[0]


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Let the kernel refuse files beyond a size, as it does when a disk or a quota is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def nobody() -> Iterator[None]:
    """Be somebody whom permissions stop, also where tests run as root."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of that size by its header, with these chunks and no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_pixels_become_pictures_and_pixels_again(pixels: NDArray[np.uint8]) -> None:
    pictures = to_pictures(pixels)
    assert [picture.size for picture in pictures] == [(64, 48), (64, 48)]
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), pixels)


@pytest.mark.parametrize(
    "array", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 3, 8, 8), np.uint8)]
)
def test_what_is_not_pixels(array: NDArray[np.uint8]) -> None:
    with pytest.raises(RequestError, match=r"expected uint8 \(images, height, width, 3\)"):
        to_pictures(array)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_file_of_each_format(tmp_path: Path, extension: str) -> None:
    gradient = np.mgrid[0:48, 0:64].sum(axis=0).astype(np.uint8)[None, :, :, None].repeat(3, axis=3)
    place = tmp_path / f"out.{extension}"
    check_output(place)
    assert not place.exists()
    save(to_pictures(gradient)[0], place)
    with open_picture(place) as found:
        difference = np.abs(np.asarray(found).astype(int) - gradient).max()
    # Measured: PNG and JPEG 0, WebP 2; other versions of the libraries may round otherwise.
    assert difference <= (0 if extension.lower() == "png" else 4)


@pytest.mark.parametrize("name", ["out", "out.gif", "out.png.exe", ".png"])
def test_an_unknown_extension(tmp_path: Path, picture: Image.Image, name: str) -> None:
    for ask in (check_output, lambda place: save(picture, place)):
        with pytest.raises(OutputError, match=r"expected one of \.png, \.jpg, \.jpeg, \.webp"):
            ask(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing(tmp_path: Path, picture: Image.Image) -> None:
    for ask in (check_output, lambda place: save(picture, place)):
        with pytest.raises(OutputError, match="make its folder first"):
            ask(tmp_path / "missing" / "out.png")


def test_a_folder_in_the_place_of_the_file(tmp_path: Path, picture: Image.Image) -> None:
    (tmp_path / "out.png").mkdir()
    with pytest.raises(OutputError, match="is not a file"):
        check_output(tmp_path / "out.png")
    with pytest.raises(OutputError, match="cannot be written"):
        save(picture, tmp_path / "out.png")
    assert [place.name for place in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, picture: Image.Image, extension: str) -> None:
    place = tmp_path / f"out.{extension}"
    place.write_bytes(b"earlier")
    with file_size_limit(500), pytest.raises(OutputError, match=r"choose another place. What was there is untouched"):
        save(picture, place)
    assert place.read_bytes() == b"earlier"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("error", "advice"), [(28, "free some space"), (30, "choose a place that you may write to")])
def test_the_advice_fits_the_error(
    tmp_path: Path, picture: Image.Image, monkeypatch: pytest.MonkeyPatch, error: int, advice: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=f"{os.strerror(error)}; {advice}"):
        save(picture, tmp_path / "out.png")


def test_a_folder_that_may_not_be_written_to(tmp_path: Path, picture: Image.Image) -> None:
    # What Pillow imports on first use lies where nobody may not look.
    save(picture, tmp_path / "out.png")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        for ask in (check_output, lambda place: save(picture, place)):
            with nobody(), pytest.raises(OutputError, match="Permission denied; choose a place that you may write to"):
                ask(Path(folder, "out.png"))
        assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("extension", ["jpg", "webp"])
def test_a_picture_too_large_for_its_format(tmp_path: Path, extension: str) -> None:
    with pytest.raises(OutputError, match=r"save a \.png"):
        save(Image.new("L", (1, 70_000)).convert("RGB"), tmp_path / f"out.{extension}")


def test_a_new_file_can_be_read_by_others_as_the_umask_says(tmp_path: Path, picture: Image.Image) -> None:
    (tmp_path / "touched").touch()
    save(picture, tmp_path / "out.png")
    mode = stat.S_IMODE((tmp_path / "out.png").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "touched").stat().st_mode)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is not a picture"),
        (b"just text", "is not a picture"),
        (b"GIF89a" + bytes(100), "is not a picture"),
        (png(30_000, 30_000), "decompression bomb"),
        (png(10_000, 10_000), "exceeds limit of"),
        (png(8, 8, (b"zTXt", b"parameters\0\0" + zlib.compress(bytes(1 << 26)))), "cannot be read as a picture"),
        (png(8, 8, (b"tEXt", b"parameters\0" + b"x" * (65 << 20))), "cannot be read as a picture"),
        (b"\xff\xd8\xff\xe1\x00\x10Exif\0\0" + bytes(4), "picture"),
        (b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(30), "picture"),
    ],
    ids=["empty", "text", "gif", "bomb", "large", "zipped", "huge", "jpeg", "webp"],
)
def test_a_hostile_picture(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "picture").write_bytes(data)
    with pytest.raises(RequestError, match=words), open_picture(tmp_path / "picture") as picture:
        picture.load()


def test_a_file_too_large_to_be_a_picture(tmp_path: Path) -> None:
    with (tmp_path / "out.png").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(RequestError, match="more than"), open_picture(tmp_path / "out.png"):
        pass


def test_pixels_that_end_early(tmp_path: Path, picture: Image.Image) -> None:
    save(picture, tmp_path / "out.png")
    os.truncate(tmp_path / "out.png", 5000)
    with pytest.raises(RequestError, match="cannot be read"), open_picture(tmp_path / "out.png") as found:
        found.load()


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(RequestError, match="cannot be read as a picture"), open_picture(place):
            pass

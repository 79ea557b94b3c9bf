from __future__ import annotations

import io
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
from latentrt.images.files import (
    PARAMETERS,
    RECORD,
    check_output,
    encode_texts,
    open_image,
    read_texts,
    save,
    to_images,
)

EXTENSIONS = ["png", "jpg", "jpeg", "webp", "PNG"]
FORMATS = ["PNG", "JPEG", "WEBP"]


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3), dtype=np.uint8)


@pytest.fixture
def image(pixels: NDArray[np.uint8]) -> Image.Image:
    return to_images(pixels)[0]


@contextmanager
def file_size_limit(limit_bytes: int) -> Iterator[None]:
    """Have the kernel refuse files beyond a size, as it does when a disk or a quota is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def unprivileged() -> Iterator[None]:
    """Run as a user whom permissions stop, also where tests run as root."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG whose header states this size, with these chunks and no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_pixels_round_trip_through_images(pixels: NDArray[np.uint8]) -> None:
    images = to_images(pixels)
    assert [image.size for image in images] == [(64, 48), (64, 48)]
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), pixels)


@pytest.mark.parametrize(
    "array", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8), np.zeros((1, 3, 8, 8), np.uint8)]
)
def test_another_shape_or_dtype_is_refused(array: NDArray[np.uint8]) -> None:
    with pytest.raises(RequestError, match=r"expected uint8 \(images, height, width, 3\)"):
        to_images(array)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_file_of_each_format(tmp_path: Path, extension: str) -> None:
    gradient = np.mgrid[0:48, 0:64].sum(axis=0).astype(np.uint8)[None, :, :, None].repeat(3, axis=3)
    place = tmp_path / f"out.{extension}"
    check_output(place)
    assert not place.exists()
    save(to_images(gradient)[0], place)
    with open_image(place) as found:
        difference = np.abs(np.asarray(found).astype(int) - gradient).max()
    # Measured: PNG and JPEG 0, WebP 2; other versions of the libraries may round otherwise.
    assert difference <= (0 if extension.lower() == "png" else 4)


@pytest.mark.parametrize("name", ["out", "out.gif", "out.png.exe", ".png"])
def test_an_unknown_extension(tmp_path: Path, image: Image.Image, name: str) -> None:
    for write in (check_output, lambda place: save(image, place)):
        with pytest.raises(OutputError, match=r"expected one of \.png, \.jpg, \.jpeg, \.webp"):
            write(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_missing(tmp_path: Path, image: Image.Image) -> None:
    for write in (check_output, lambda place: save(image, place)):
        with pytest.raises(OutputError, match="make its folder first"):
            write(tmp_path / "missing" / "out.png")


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "loop.png", "a\0.png"], ids=["too long", "loop", "null"])
def test_a_path_that_names_no_file(tmp_path: Path, image: Image.Image, name: str) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(OutputError, match=r"choose another path|cannot be written"):
        check_output(tmp_path / name)
    if name != "loop.png":  # which is replaced
        with pytest.raises(OutputError, match=r"choose another path|cannot be written"):
            save(image, tmp_path / name)


def test_the_path_of_a_folder(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "out.png").mkdir()
    with pytest.raises(OutputError, match="is not a file"):
        check_output(tmp_path / "out.png")
    with pytest.raises(OutputError, match="cannot be written"):
        save(image, tmp_path / "out.png")
    assert [place.name for place in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("extension", ["png", "jpg", "webp"])
def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path, image: Image.Image, extension: str) -> None:
    place = tmp_path / f"out.{extension}"
    place.write_bytes(b"earlier")
    with file_size_limit(500), pytest.raises(OutputError, match="choose another path"):
        save(image, place)
    assert place.read_bytes() == b"earlier"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("error", "advice"), [(28, "free some space"), (30, "choose a path that you may write to")])
def test_the_advice_fits_the_error(
    tmp_path: Path, image: Image.Image, monkeypatch: pytest.MonkeyPatch, error: int, advice: str
) -> None:
    def fail(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=f"{os.strerror(error)}; {advice}"):
        save(image, tmp_path / "out.png")


def test_a_folder_without_write_permission(tmp_path: Path, image: Image.Image) -> None:
    # Pillow imports its plugins on first use, from a folder that the unprivileged user may not read.
    save(image, tmp_path / "out.png")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        for write in (check_output, lambda place: save(image, place)):
            with (
                unprivileged(),
                pytest.raises(OutputError, match="Permission denied"),
            ):
                write(Path(folder, "out.png"))
        assert not list(Path(folder).iterdir())


@pytest.mark.parametrize("extension", ["jpg", "webp"])
def test_an_image_too_large_for_its_format(tmp_path: Path, extension: str) -> None:
    with pytest.raises(OutputError, match=r"save a \.png"):
        save(Image.new("L", (1, 70_000)).convert("RGB"), tmp_path / f"out.{extension}")


def test_a_new_file_has_the_permissions_of_the_umwrite(tmp_path: Path, image: Image.Image) -> None:
    (tmp_path / "touched").touch()
    save(image, tmp_path / "out.png")
    mode = stat.S_IMODE((tmp_path / "out.png").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "touched").stat().st_mode)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is not an image"),
        (b"just text", "is not an image"),
        (b"GIF89a" + bytes(100), "is not an image"),
        (png(30_000, 30_000), "decompression bomb"),
        (png(10_000, 10_000), "exceeds limit of"),
        (png(8, 8, (b"zTXt", b"parameters\0\0" + zlib.compress(bytes(1 << 26)))), "cannot be read as an image"),
        (png(8, 8, (b"tEXt", b"parameters\0" + b"x" * (65 << 20))), "cannot be read as an image"),
        (b"\xff\xd8\xff\xe1\x00\x10Exif\0\0" + bytes(4), "image"),
        (b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(30), "image"),
    ],
    ids=["empty", "text", "gif", "bomb", "large", "zipped", "huge", "jpeg", "webp"],
)
def test_a_hostile_file(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "image").write_bytes(data)
    with pytest.raises(RequestError, match=message), open_image(tmp_path / "image") as image:
        image.load()


def test_a_bomb_is_refused_where_a_program_lifted_the_limit_of_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "out.png").write_bytes(png(10_000, 10_000))
    with pytest.raises(RequestError, match="10000 × 10000"), open_image(tmp_path / "out.png"):
        pass


def test_a_file_too_large_to_be_an_image(tmp_path: Path) -> None:
    with (tmp_path / "out.png").open("wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(RequestError, match="at most"), open_image(tmp_path / "out.png"):
        pass


def test_pixels_that_end_early(tmp_path: Path, image: Image.Image) -> None:
    save(image, tmp_path / "out.png")
    os.truncate(tmp_path / "out.png", 5000)
    with pytest.raises(RequestError, match="cannot be read"), open_image(tmp_path / "out.png") as found:
        found.load()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path, tmp_path / "missing", Path("/dev/zero")):
        with pytest.raises(RequestError, match="cannot be read as an image"), open_image(place):
            pass


def encode(file_format: str, **options: object) -> Image.Image:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, file_format, **options)
    return Image.open(stream)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("parameters", ["plain", "größer", "日本, 👩‍🚀", "two\nlines", "x" * 10_000, "日" * 10_000])
def test_texts_round_trip(file_format: str, parameters: str) -> None:
    texts = {PARAMETERS: parameters, RECORD: '{"seed": 7}'}
    assert read_texts(encode(file_format, **encode_texts(file_format, texts))) == texts


@pytest.mark.parametrize("file_format", FORMATS)
def test_an_image_without_texts(file_format: str) -> None:
    assert read_texts(encode(file_format)) == {}


@pytest.mark.parametrize("text", ["plain", "日本"])
def test_latin_1_text_is_a_plain_chunk_and_other_text_an_international_one(text: str) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG", **encode_texts("PNG", {PARAMETERS: text}))
    assert (b"tEXt" if text.isascii() else b"iTXt") + b"parameters\0" in stream.getvalue()


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_parameters_are_stored_in_the_user_comment(file_format: str) -> None:
    exif = encode(file_format, **encode_texts(file_format, {PARAMETERS: "Steps: 1"})).getexif()
    assert exif.get_ifd(0x8769)[0x9286] == b"UNICODE\0" + "Steps: 1".encode("utf-16-be")


@pytest.mark.parametrize(
    ("comment", "text"),
    [
        (b"UNICODE\0" + "Steps: 1".encode("utf-16-be"), "Steps: 1"),
        (b"UNICODE\0" + "Steps: 1".encode("utf-16-le"), "Steps: 1"),
        (b"ASCII\0\0\0Steps: 1", "Steps: 1"),
        (b"UNICODE\0\xd8\x41", "\ufffd"),
        (b"UNICODE\0", ""),
        (b"JIS\0\0\0\0\0Steps", None),
        (b"short", None),
        (b"", None),
    ],
)
def test_user_comments_of_other_tools(comment: bytes, text: str | None) -> None:
    exif = Image.Exif()
    exif[0x8769] = {0x9286: comment}
    assert read_texts(encode("JPEG", exif=exif)).get(PARAMETERS) == text


def test_a_description_by_a_camera_is_not_a_record() -> None:
    exif = Image.Exif()
    exif[0x010E] = '{"a": "description"}'
    assert RECORD not in read_texts(encode("JPEG", exif=exif))


def test_a_jpeg_holds_64_kib() -> None:
    with pytest.raises(OutputError, match="65,533"):
        encode_texts("JPEG", {PARAMETERS: "x" * 40_000})
    for file_format in ("PNG", "WEBP"):
        assert read_texts(encode(file_format, **encode_texts(file_format, {PARAMETERS: "x" * 40_000})))

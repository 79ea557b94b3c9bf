from __future__ import annotations

import io

import pytest
from PIL import Image

from latentrt.errors import OutputError
from latentrt.images.texts import PARAMETERS, RECORD, carried_texts, carry_texts

FORMATS = ["PNG", "JPEG", "WEBP"]


def written(file_format: str, **options: object) -> Image.Image:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, file_format, **options)
    return Image.open(stream)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("parameters", ["plain", "größer", "日本, 👩‍🚀", "two\nlines", "x" * 10_000, "日" * 10_000])
def test_texts_come_back(file_format: str, parameters: str) -> None:
    texts = {PARAMETERS: parameters, RECORD: '{"seed": 7}'}
    assert carried_texts(written(file_format, **carry_texts(file_format, texts))) == texts


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_picture_without_texts(file_format: str) -> None:
    assert carried_texts(written(file_format)) == {}


@pytest.mark.parametrize("text", ["plain", "日本"])
def test_a_text_of_latin_1_is_a_plain_chunk_and_any_other_an_international_one(text: str) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG", **carry_texts("PNG", {PARAMETERS: text}))
    assert (b"tEXt" if text.isascii() else b"iTXt") + b"parameters\0" in stream.getvalue()


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP"])
def test_the_user_comment_is_what_other_tools_read(file_format: str) -> None:
    exif = written(file_format, **carry_texts(file_format, {PARAMETERS: "Steps: 1"})).getexif()
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
    assert carried_texts(written("JPEG", exif=exif)).get(PARAMETERS) == text


def test_a_camera_describes_its_picture(tmp_path: object) -> None:
    exif = Image.Exif()
    exif[0x010E] = '{"a": "description"}'
    assert RECORD not in carried_texts(written("JPEG", exif=exif))


def test_a_jpeg_holds_64_kib() -> None:
    with pytest.raises(OutputError, match=r"65,533 at most in a JPEG; save a \.png or \.webp"):
        carry_texts("JPEG", {PARAMETERS: "x" * 40_000})
    for file_format in ("PNG", "WEBP"):
        assert carried_texts(written(file_format, **carry_texts(file_format, {PARAMETERS: "x" * 40_000})))

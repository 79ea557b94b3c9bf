"""The structure of an image file is bounded before a decoder walks over it."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from latentrt.errors import RequestError
from latentrt.images.files import MAX_PIXELS, decode_image
from latentrt.images.structure import MAX_EXIF_BYTES, MAX_EXIF_SEGMENTS, MAX_SCANS, MAX_SEGMENTS, check_structure


def image(file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(stream, file_format, **options)
    return stream.getvalue()


def segments(marker: int, data: bytes, count: int) -> bytes:
    """Return a JPEG with so many of these segments."""
    jpeg, segment = image("JPEG"), struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data
    return jpeg[:2] + segment * count + jpeg[2:]


def scans(count: int) -> bytes:
    """Return a progressive JPEG whose last scan is there so many times."""
    jpeg = image("JPEG", progressive=True)
    at = jpeg.rindex(b"\xff\xda")
    return jpeg[:at] + jpeg[at:-2] * count + jpeg[-2:]


def chunks(kind: bytes, data: bytes, count: int) -> bytes:
    """Return a PNG with so many of these chunks; their sums are not looked at."""
    png = image("PNG")
    return png[:33] + (struct.pack(">I", len(data)) + kind + data + bytes(4)) * count + png[33:]


def webp(kind: bytes, data: bytes) -> bytes:
    body = b"WEBP" + kind + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(body)) + body


EXIF = b"Exif\0\0II*\0"


@pytest.mark.parametrize(
    ("data", "bound"),
    [
        (lambda: segments(0xE1, EXIF, 5000), f"{MAX_EXIF_SEGMENTS} EXIF segments"),
        (lambda: segments(0xE1, EXIF + bytes(65_000), MAX_EXIF_SEGMENTS), f"{MAX_EXIF_BYTES:,} bytes of EXIF"),
        (lambda: segments(0xFE, b"", MAX_SEGMENTS + 1), f"{MAX_SEGMENTS:,} segments"),
        (lambda: b"\xff\xd8" + b"\xff" * (2 * MAX_SEGMENTS), f"{MAX_SEGMENTS:,} segments"),
        (lambda: b"\xff\xd8" * (2 * MAX_SEGMENTS), f"{MAX_SEGMENTS:,} segments"),
        (lambda: scans(MAX_SCANS + 1), f"{MAX_SCANS} scans"),
        (lambda: chunks(b"tEXt", b"", MAX_SEGMENTS + 1), f"{MAX_SEGMENTS:,} chunks"),
        (lambda: chunks(b"eXIf", bytes(MAX_EXIF_BYTES + 1), 1), f"{MAX_EXIF_BYTES:,} bytes of EXIF"),
        (lambda: webp(b"EXIF", bytes(MAX_EXIF_BYTES + 2)), f"{MAX_EXIF_BYTES:,} bytes of EXIF"),
        (lambda: webp(b"VP8X", bytes(4) + b"\xff" * 6), f"{MAX_PIXELS:,} pixels"),
        (lambda: webp(b"VP8L", b"\x2f\xff\xff\xff\xff\0\0\0\0\0"), f"{MAX_PIXELS:,} pixels"),
        (lambda: webp(b"VP8 ", bytes(6) + b"\xff\x3f\xff\x3f"), f"{MAX_PIXELS:,} pixels"),
    ],
)
def test_a_file_beyond_a_bound_reaches_no_decoder(
    monkeypatch: pytest.MonkeyPatch, data: Callable[[], bytes], bound: str
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(RequestError, match=f"more than {bound}"), decode_image(data(), "got a file, which"):
        pass


@pytest.mark.parametrize(
    "data",
    [
        lambda: segments(0xE1, EXIF + b"\x08\0\0\0\0\0\0\0\0\0", MAX_EXIF_SEGMENTS),
        lambda: segments(0xFE, b"", 1500),
        lambda: scans(MAX_SCANS // 2),
        lambda: chunks(b"tEXt", b"a\0b", MAX_SEGMENTS - 10),
        *(lambda each=each: image(each) for each in ("PNG", "JPEG", "WEBP")),
        lambda: image("WEBP", lossless=True, exif=bytes(1000)),
        lambda: b"",
        lambda: b"GIF89a",
        *(lambda each=each: image(each)[:40] for each in ("PNG", "JPEG", "WEBP")),
    ],
)
def test_a_file_within_the_bounds_is_left_at_its_beginning(data: Callable[[], bytes]) -> None:
    stream = io.BytesIO(data())
    check_structure(stream, MAX_PIXELS)
    assert stream.tell() == 0

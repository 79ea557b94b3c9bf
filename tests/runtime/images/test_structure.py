"""The structure of an image file is bounded before a decoder walks over it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from latentrt.errors import RequestError
from latentrt.images.files import MAX_PIXELS, decode_image
from latentrt.images.inputs import load_image
from latentrt.images.structure import (
    MAX_CHROMATICITY_BYTES,
    MAX_COMPRESSED_TEXTS,
    MAX_EXIF_BYTES,
    MAX_EXIF_SEGMENTS,
    MAX_EXIF_TAGS,
    MAX_PHOTOSHOP_BYTES,
    MAX_SCANS,
    MAX_SEGMENTS,
    MAX_STRAY_BYTES,
    MAX_TABLE_BYTES,
    check_structure,
)


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


def webp(kind: bytes, data: bytes, count: int = 1) -> bytes:
    """Return a WebP of so many of these chunks alone."""
    body = b"WEBP" + (kind + struct.pack("<I", len(data)) + data) * count
    return b"RIFF" + struct.pack("<I", len(body)) + body


EXIF = b"Exif\0\0II*\0"


def tiff(*directories: list[tuple[int, int, int, int]], values: int = 0, order: str = "<") -> bytes:
    """Return EXIF data of directories, one behind the other, of (tag, type, number, value), and so many more bytes."""
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8)
    for tags in directories:
        head += struct.pack(f"{order}H", len(tags))
        head += b"".join(struct.pack(f"{order}HHII", *each) for each in tags) + bytes(4)
    return head + bytes(values)


SIZE = 500_000
OVERLAP = [(tag, 7, SIZE, 1000) for tag in range(1, 10)]


def overlapping(order: str = "<", kind: int = 4) -> bytes:
    """Return the overlap in a directory inside the first, whose place has this type."""
    place = 8 + 2 + 12 + 4
    value = place << 16 if (order, kind) == (">", 3) else place
    return tiff([(0x8769, kind, 1, value)], OVERLAP, values=SIZE + 1000, order=order)


def jpeg_of(exif: bytes) -> bytes:
    """Return a JPEG with EXIF data in as many segments as it takes."""
    parts = [b"Exif\0\0" + exif[at : at + 65_000] for at in range(0, len(exif), 65_000)]
    jpeg = image("JPEG")
    return jpeg[:2] + b"".join(struct.pack(">BBH", 0xFF, 0xE1, len(part) + 2) + part for part in parts) + jpeg[2:]


def profile(exif: bytes) -> bytes:
    """Return a PNG with EXIF data as ImageMagick writes it, behind the pixels."""
    text = b"Raw profile type exif\0\nexif\n%8d\n" % len(exif) + exif.hex().encode()
    png = image("PNG")
    chunk = b"tEXt" + text
    return png[:-12] + struct.pack(">I", len(text)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[-12:]


@pytest.mark.parametrize(
    ("data", "bound"),
    [
        (lambda: segments(0xE1, EXIF, 5000), f"{MAX_EXIF_SEGMENTS} EXIF segments"),
        (lambda: segments(0xE1, EXIF + bytes(65_000), MAX_EXIF_SEGMENTS), f"{MAX_EXIF_BYTES:,} bytes of EXIF"),
        (lambda: segments(0xFE, b"", MAX_SEGMENTS + 1), f"{MAX_SEGMENTS:,} segments"),
        (lambda: b"\xff\xd8" + b"\xff" * (2 * MAX_SEGMENTS), f"{MAX_SEGMENTS:,} segments"),
        (lambda: b"\xff\xd8" * (2 * MAX_SEGMENTS), f"{MAX_SEGMENTS:,} segments"),
        (
            lambda: image("JPEG")[:2] + bytes(MAX_STRAY_BYTES + 1) + image("JPEG")[2:],
            f"{MAX_STRAY_BYTES:,} bytes between segments",
        ),
        (lambda: scans(MAX_SCANS + 1), f"{MAX_SCANS} scans"),
        (lambda: chunks(b"tEXt", b"", MAX_SEGMENTS + 1), f"{MAX_SEGMENTS:,} chunks"),
        (lambda: chunks(b"eXIf", bytes(MAX_EXIF_BYTES + 1), 1), f"{MAX_EXIF_BYTES:,} bytes of EXIF"),
        (lambda: webp(b"EXIF", bytes(MAX_EXIF_BYTES + 2)), f"{MAX_EXIF_BYTES:,} bytes of EXIF"),
        *(
            (make, f"{MAX_EXIF_BYTES:,} bytes of EXIF values")
            for make in (
                lambda: jpeg_of(tiff(OVERLAP, values=SIZE + 1000)),
                lambda: jpeg_of(b"Exif\0\0" + tiff(OVERLAP, values=SIZE + 1000)),
                lambda: jpeg_of(b"Exif\0\0" * 3 + tiff(OVERLAP, values=SIZE + 1000)),
                # A decoder passes over bytes between segments, and reads no length behind some markers.
                *(
                    lambda stray=stray: image("JPEG")[:2] + stray + jpeg_of(tiff(OVERLAP, values=SIZE + 1000))[2:]
                    for stray in (b"x", bytes(9), *(bytes([0xFF, each]) for each in (0x00, 0xC8, 0xF0, 0xFD)))
                ),
                lambda: chunks(b"eXIf", tiff(OVERLAP, values=SIZE + 1000), 1),
                lambda: webp(b"EXIF", tiff(OVERLAP, values=SIZE + 1000)),
                lambda: webp(b"EXIF", b"Exif\0\0" + tiff(OVERLAP, values=SIZE + 1000)),
                *(
                    lambda order=order, kind=kind: jpeg_of(overlapping(order, kind))
                    for order in "<>"
                    for kind in (3, 4, 9, 13)
                ),
                lambda: segments(
                    0xE2, b"MPF\0" + tiff([(1 + tag, 5, 4000, 1000) for tag in range(200)], values=40_000), 1
                ),
            )
        ),
        (lambda: jpeg_of(tiff([(tag, 1, 1, 0) for tag in range(MAX_EXIF_TAGS + 1)])), f"{MAX_EXIF_TAGS:,} EXIF tags"),
        # The tags and values of all segments count together.
        (
            lambda: segments(0xE2, b"MPF\0" + tiff([(tag, 1, 1, 0) for tag in range(MAX_EXIF_TAGS // 10)]), 11),
            f"{MAX_EXIF_TAGS:,} EXIF tags",
        ),
        (
            lambda: segments(0xE2, b"MPF\0" + tiff([(1, 7, 60_000, 100)], values=61_000), 70),
            f"{MAX_EXIF_BYTES:,} bytes of EXIF values",
        ),
        (lambda: segments(0xED, bytes(65_000), MAX_PHOTOSHOP_BYTES // 65_000 + 1), f"{MAX_PHOTOSHOP_BYTES:,} bytes of"),
        (lambda: segments(0xDB, bytes(65_000), 2), f"{MAX_TABLE_BYTES:,} bytes of quantization tables"),
        (lambda: chunks(b"cHRM", bytes(MAX_CHROMATICITY_BYTES + 1), 1), f"{MAX_CHROMATICITY_BYTES} bytes of"),
        (lambda: chunks(b"zTXt", b"", MAX_COMPRESSED_TEXTS + 1), f"{MAX_COMPRESSED_TEXTS} texts"),
        (lambda: chunks(b"iTXt", b"", MAX_COMPRESSED_TEXTS + 1), f"{MAX_COMPRESSED_TEXTS} texts"),
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
        *(lambda kind=kind: chunks(kind, b"", 2) for kind in (b"iCCP", b"eXIf")),
        *(lambda marker=marker: segments(marker, bytes(9), 1) for marker in (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xCF, 0xDE)),
        *(lambda kind=kind: webp(kind, b"", 2) for kind in (b"ICCP", b"EXIF", b"XMP ")),
        lambda: image("PNG", exif=b"MM\0*")[:-12] + chunks(b"eXIf", b"", 1)[33:45] + image("PNG")[-12:],
    ],
)
def test_what_a_file_has_once_is_refused_twice(monkeypatch: pytest.MonkeyPatch, data: Callable[[], bytes]) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    with (
        pytest.raises(RequestError, match=r"more than one \w+ (chunk|header), expected one at most"),
        decode_image(data(), "got a file"),
    ):
        pass


@pytest.mark.parametrize(
    "data",
    [
        # As cameras and editors write them: a profile of several segments, several of Photoshop's, a list of images.
        lambda: image("JPEG", icc_profile=bytes(300_000)),
        lambda: segments(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\0" * 5000, 40),
        lambda: segments(0xDB, b"\0" + bytes(64), 4),
        lambda: segments(0xE2, b"MPF\0" + tiff([(0xB000, 7, 4, 0), (0xB001, 4, 1, 2)]), 2),
        lambda: chunks(b"iTXt", b"a\0\0\0\0\0b", MAX_COMPRESSED_TEXTS),
        lambda: chunks(b"cHRM", bytes(MAX_CHROMATICITY_BYTES), 1),
        *(
            lambda each=each: image(each, icc_profile=bytes(3000), exif=tiff([(0x0112, 3, 1, 6)]))
            for each in ("PNG", "JPEG", "WEBP")
        ),
        lambda: segments(0xE1, EXIF + b"\x08\0\0\0\0\0\0\0\0\0", MAX_EXIF_SEGMENTS),
        lambda: jpeg_of(tiff(OVERLAP[:8], values=SIZE + 1000)),
        lambda: jpeg_of(tiff([(tag, 1, 1, 0) for tag in range(MAX_EXIF_TAGS)])),
        # Broken, as real files are: values beyond the end, directories of unknown types, negative and cyclic places.
        lambda: jpeg_of(tiff([(tag, 7, 2**31, 1000) for tag in range(100)])),
        lambda: jpeg_of(tiff([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0xA005, 9, 1, 2**32 - 5), (1, 99, 9, 9)])),
        lambda: jpeg_of(b"II*\0\xff\xff\xff\xff"),
        lambda: jpeg_of(b"no TIFF at all"),
        lambda: segments(0xFE, b"", 1500),
        lambda: image("JPEG")[:2] + bytes(MAX_STRAY_BYTES) + image("JPEG")[2:],
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


def test_exif_data_as_a_text_is_checked_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match=f"more than {MAX_EXIF_BYTES:,} bytes of EXIF values"):
        load_image(profile(tiff(OVERLAP, values=SIZE + 1000)))
    assert load_image(profile(tiff([(0x0112, 3, 1, 6)]))).image.size == (16, 16)


def test_bigtiff_is_refused() -> None:
    with pytest.raises(RequestError, match="BigTIFF"):
        load_image(jpeg_of(b"II+\0" + bytes(20)))

"""Bounds on the structure of an image file, checked before a decoder reads it.

Pillow walks over the segments of a file in Python, and joins the EXIF segments of a JPEG one by one: thousands of
segments take minutes. A JPEG with thousands of scans takes hours. Pixels are bounded in `latentrt.images.files`.

Sources: ITU-T T.81, annex B (JPEG); W3C PNG, section 5; RFC 9649 (WebP).
"""

from __future__ import annotations

import struct
from typing import IO

__all__ = ["MAX_CHUNKS", "MAX_EXIF_BYTES", "MAX_EXIF_SEGMENTS", "MAX_SCANS", "MAX_SEGMENTS", "check_structure"]

MAX_EXIF_BYTES = 4 << 20
"""Most bytes of EXIF data in a file, those of a preview included."""
MAX_EXIF_SEGMENTS = 80
"""Most EXIF segments of a JPEG: 64 kB each, for `MAX_EXIF_BYTES`."""
MAX_SEGMENTS = 2_000
"""Most segments of a JPEG before its pixels, and chunks of a PNG that hold no pixels."""
MAX_CHUNKS = 200_000
"""Most chunks of a PNG or WebP: a PNG of 256 MiB in chunks of 8 kB has 32,768."""
MAX_SCANS = 100
"""Most scans of a JPEG; progressive encoders write about ten, and a decoder visits every pixel in each."""


def check_structure(stream: IO[bytes], max_pixels: int) -> None:
    """Check the number and the size of an image file's segments. Files of other formats are left to the decoder.

    Args:
        stream: the open file, at its beginning, to which it is rewound.
        max_pixels: the most pixels of a WebP, whose decoder allocates them when the file is opened.

    Raises:
        ValueError: a bound is exceeded.
    """
    start = stream.read(12)
    if start.startswith(b"\xff\xd8"):
        _check_jpeg(stream)
    elif start.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(stream)
    elif start[:4] == b"RIFF" and start[8:] == b"WEBP":
        _check_webp(stream, max_pixels)
    stream.seek(0)


def _check_jpeg(stream: IO[bytes]) -> None:
    stream.seek(2)
    segments = exif_segments = exif_bytes = 0
    while (marker := stream.read(2))[:1] == b"\xff" and len(marker) == 2:
        segments += 1  # fill bytes count, as the decoder walks over them too
        _check("segments", segments, MAX_SEGMENTS)
        if marker[1] == 0xFF:
            stream.seek(-1, 1)
            continue
        if marker[1] <= 0x01 or 0xD0 <= marker[1] <= 0xD9:  # without a length
            continue
        length = int.from_bytes(stream.read(2), "big")
        if marker[1] == 0xE1:
            found = stream.read(6)
            stream.seek(-len(found), 1)
            if found.startswith(b"Exif\0\0"):
                exif_segments, exif_bytes = exif_segments + 1, exif_bytes + length
                _check("EXIF segments", exif_segments, MAX_EXIF_SEGMENTS)
                _check("bytes of EXIF", exif_bytes, MAX_EXIF_BYTES)
        stream.seek(max(length - 2, 0), 1)
        if marker[1] == 0xDA:
            break
    _check("scans", _count(stream, b"\xff\xda") + 1, MAX_SCANS)


def _check_png(stream: IO[bytes]) -> None:
    stream.seek(8)
    chunks = others = 0
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        chunks, others = chunks + 1, others + (kind not in (b"IDAT", b"fdAT"))
        _check("chunks", chunks, MAX_CHUNKS)
        _check("chunks without pixels", others, MAX_SEGMENTS)
        if kind == b"eXIf":
            _check("bytes of EXIF", length, MAX_EXIF_BYTES)
        if kind == b"IEND":
            return
        stream.seek(length + 4, 1)


def _check_webp(stream: IO[bytes], max_pixels: int) -> None:
    chunks = 0
    while len(head := stream.read(8)) == 8:
        kind, length = struct.unpack("<4sI", head)
        chunks += 1
        _check("chunks", chunks, MAX_CHUNKS)
        if kind == b"EXIF":
            _check("bytes of EXIF", length, MAX_EXIF_BYTES)
        found = stream.read(min(length, 10))
        _check("pixels", _count_webp_pixels(kind, found), max_pixels)
        stream.seek(length + length % 2 - len(found), 1)


def _count_webp_pixels(kind: bytes, data: bytes) -> int:
    """Return the number of pixels that the first ten bytes of a chunk state; 0 for other chunks."""
    data = data.ljust(10, b"\0")
    if kind == b"VP8X":
        width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (4, 7))
    elif kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8 ":
        width, height = (int.from_bytes(data[start : start + 2], "little") & 0x3FFF for start in (6, 8))
    else:
        return 0
    return width * height


def _count(stream: IO[bytes], pattern: bytes) -> int:
    """Count a pattern of two bytes in the rest of a stream."""
    count, last = 0, b""
    while block := stream.read(1 << 20):
        count += (last + block).count(pattern)
        last = block[-1:]
    return count


def _check(unit: str, number: int, most: int) -> None:
    if number > most:
        raise ValueError(f"more than {most:,} {unit}")

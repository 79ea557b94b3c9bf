"""Bounds on the structure of an image file, checked before a decoder reads it.

Pillow walks over the segments of a file in Python, and joins the EXIF segments of a JPEG one by one: thousands of
segments take minutes. A JPEG with thousands of scans takes hours. EXIF data can name the same bytes for each of
thousands of tags, and releases of Pillow copy them for each. Pixels are bounded in `latentrt.images.files`.

Sources: ITU-T T.81, annex B (JPEG); W3C PNG, section 5; RFC 9649 (WebP); TIFF 6.0, section 2 (EXIF).
"""

from __future__ import annotations

import re
import struct
from typing import IO

__all__ = [
    "MAX_CHUNKS",
    "MAX_EXIF_BYTES",
    "MAX_EXIF_SEGMENTS",
    "MAX_EXIF_TAGS",
    "MAX_SCANS",
    "MAX_SEGMENTS",
    "MAX_STRAY_BYTES",
    "check_exif",
    "check_structure",
]

MAX_EXIF_BYTES = 4 << 20
"""Most bytes of EXIF data in a file, those of a preview included, and of the values that its tags name in it."""
MAX_EXIF_TAGS = 2_000
"""Most tags of EXIF data; a camera writes about a hundred."""
MAX_EXIF_SEGMENTS = 80
"""Most EXIF segments of a JPEG: 64 kB each, for `MAX_EXIF_BYTES`."""
MAX_SEGMENTS = 2_000
"""Most segments of a JPEG before its pixels, and chunks of a PNG that hold no pixels."""
MAX_STRAY_BYTES = 1 << 16
"""Most bytes between the segments of a JPEG that belong to none; a decoder reads them one by one."""
MAX_CHUNKS = 200_000
"""Most chunks of a PNG or WebP: a PNG of 256 MiB in chunks of 8 kB has 32,768."""
MAX_SCANS = 100
"""Most scans of a JPEG; progressive encoders write about ten, and a decoder visits every pixel in each."""


_EXIF_MARK = b"Exif\0\0"
_MPF_MARK = b"MPF\0"  # a list of several images, in the form of EXIF data
_EXIF_MARKS = re.compile(b"(Exif\0\0)*")  # releases of Pillow remove one, two or all
# Markers of a JPEG that no length follows: escaped 0xFF, RST, SOI, EOI, and those that Pillow gives no meaning.
_WITHOUT_LENGTH = {0x00, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}
# The bytes of a value of each type.
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
# Tags whose value is the place of a further directory: those of EXIF itself, of GPS and of interoperability.
_DIRECTORIES = {0x8769, 0x8825, 0xA005}
# The form of such a place in the four bytes of a tag, by its type; of other types a decoder takes none.
_PLACES = {3: "H", 4: "I", 8: "H", 9: "I", 13: "I"}


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
    segments = exif_segments = stray = 0
    exif = bytearray()
    byte = stream.read(1)
    while byte:
        if byte != b"\xff":
            stray += 1
            _check("bytes between segments", stray, MAX_STRAY_BYTES)
            byte = stream.read(1)
            continue
        segments += 1  # fill bytes count, as the decoder walks over them too
        _check("segments", segments, MAX_SEGMENTS)
        byte = stream.read(1)
        if byte == b"\xff":
            continue
        marker, byte = int.from_bytes(byte, "big"), b""
        if 0x00 < marker < 0xC0:
            break  # the decoder knows no such segment, and refuses the file
        if marker not in _WITHOUT_LENGTH:
            length = max(int.from_bytes(stream.read(2), "big") - 2, 0)
            if marker == 0xE1:
                found = stream.read(length)
                if found.startswith(_EXIF_MARK):
                    exif_segments += 1
                    exif += found.removeprefix(_EXIF_MARK)
                    _check("EXIF segments", exif_segments, MAX_EXIF_SEGMENTS)
                    _check("bytes of EXIF", len(exif), MAX_EXIF_BYTES)
            elif marker == 0xE2:
                found = stream.read(length)
                if found.startswith(_MPF_MARK):
                    check_exif(found.removeprefix(_MPF_MARK))
            else:
                stream.seek(length, 1)
                if marker == 0xDA:
                    break
        byte = stream.read(1)
    check_exif(bytes(exif))
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
            found = stream.read(length)
            check_exif(found)
            stream.seek(-len(found), 1)
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
            found = stream.read(length)
            check_exif(found)
            stream.seek(-len(found), 1)
        found = stream.read(min(length, 10))
        _check("pixels", _count_webp_pixels(kind, found), max_pixels)
        stream.seek(length + length % 2 - len(found), 1)


def check_exif(data: bytes) -> None:
    """Check EXIF data: the number of its tags, and the size of their values, which may overlap.

    Args:
        data: a TIFF file, with or without marks before it. Data that is not TIFF is left to the decoder.

    Raises:
        ValueError: a bound is exceeded, or the data is a BigTIFF.
    """
    _check("bytes of EXIF", len(data), MAX_EXIF_BYTES)
    data = _EXIF_MARKS.sub(b"", data, count=1)
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        return
    if 43 in data[2:4]:
        raise ValueError("EXIF data of the form BigTIFF, which no camera writes")
    tags = size = 0
    seen, starts = set[int](), [int(struct.unpack_from(f"{order}I", data, 4)[0])]
    while starts:
        start = starts.pop()
        if start in seen or not 0 <= start <= len(data) - 2:
            continue
        seen.add(start)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for at in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
            tag, kind, number, value = struct.unpack_from(f"{order}HHII", data, at)
            tags += 1
            _check("EXIF tags", tags, MAX_EXIF_TAGS)
            if tag in _DIRECTORIES and kind in _PLACES:
                starts.extend(struct.unpack_from(f"{order}{_PLACES[kind]}", data, at + 8))
            needed = number * _TYPE_BYTES.get(kind, 0)
            if needed > 4 and value + needed <= len(data):  # a decoder passes over the others
                size += needed
                _check("bytes of EXIF values", size, MAX_EXIF_BYTES)


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

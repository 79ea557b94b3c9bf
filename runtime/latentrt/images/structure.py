"""Bounds on the structure of an image file, checked before a decoder reads it.

Pillow walks over the segments of a file in Python, and joins the EXIF segments of a JPEG one by one: thousands of
segments take minutes. A JPEG with thousands of scans takes hours. EXIF data can name the same bytes for each of
thousands of tags, and releases of Pillow copy them for each. The lists inside segments (tables, channels, Photoshop's
blocks) are walked over in Python too, and a short chunk of a PNG unpacks to 1 MiB, although at most the last chunk of a
kind is used. So what a specification has once must be there once. Pixels are bounded in `latentrt.images.files`.

Sources: ITU-T T.81, annex B (JPEG); W3C PNG, sections 5.6 and 11.3; RFC 9649, section 2.7 (WebP); TIFF 6.0, section 2
(EXIF); Adobe Photoshop File Formats Specification (image resource blocks).
"""

from __future__ import annotations

import re
import struct
from typing import IO

__all__ = [
    "MAX_CHROMATICITY_BYTES",
    "MAX_CHUNKS",
    "MAX_COMPRESSED_TEXTS",
    "MAX_EXIF_BYTES",
    "MAX_EXIF_SEGMENTS",
    "MAX_EXIF_TAGS",
    "MAX_PHOTOSHOP_BYTES",
    "MAX_SCANS",
    "MAX_SEGMENTS",
    "MAX_STRAY_BYTES",
    "MAX_TABLE_BYTES",
    "check_exif",
    "check_structure",
]

MAX_EXIF_BYTES = 4 << 20
"""Most bytes of EXIF data in a file, those of a preview included, and of the values that its tags name in it."""
MAX_EXIF_TAGS = 2_000
"""Most tags of EXIF data and of lists of several images in a file; a camera writes about a hundred."""
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
MAX_TABLE_BYTES = 1 << 16
"""Most bytes of the quantization tables (DQT) of a JPEG: its at most four tables have 65 or 129 bytes each."""
MAX_PHOTOSHOP_BYTES = 4 << 20
"""Most bytes of the segments of a JPEG (APP13) that hold Photoshop's blocks of at least 12 bytes."""
MAX_CHROMATICITY_BYTES = 32
"""Most bytes of a PNG's chromaticities (cHRM), which have as many; releases of Pillow unpack further ones."""
MAX_COMPRESSED_TEXTS = 200
"""Most texts of a PNG that may be compressed (zTXt, iTXt): each may unpack to 1 MiB, also if it is refused then."""


_EXIF_MARK = b"Exif\0\0"
_MPF_MARK = b"MPF\0"  # a list of several images, in the form of EXIF data
_EXIF_MARKS = re.compile(b"(Exif\0\0)*")  # releases of Pillow remove one, two or all
# Markers of a JPEG that no length follows: escaped 0xFF, RST, SOI, EOI, and those that Pillow gives no meaning.
_WITHOUT_LENGTH = {0x00, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE)}
# Frame headers; DHP has their form.
_FRAME_HEADERS = {*range(0xC0, 0xD0), 0xDE} - {0xC4, 0xC8, 0xCC}
# Chunks that PNG and WebP have at most once.
_ONCE = {b"iCCP", b"eXIf", b"ICCP", b"EXIF", b"XMP "}
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
    segments = exif_segments = stray = tables = photoshop = 0
    exif, checked, found_once = bytearray(), _ExifBounds(), set[str]()
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
                    checked.add(found.removeprefix(_MPF_MARK))
            else:
                if marker in _FRAME_HEADERS:
                    _check_once("frame header", found_once)
                tables += length if marker == 0xDB else 0
                photoshop += length if marker == 0xED else 0
                _check("bytes of quantization tables", tables, MAX_TABLE_BYTES)
                _check("bytes of Photoshop's segments", photoshop, MAX_PHOTOSHOP_BYTES)
                stream.seek(length, 1)
                if marker == 0xDA:
                    break
        byte = stream.read(1)
    checked.add(bytes(exif))
    _check("scans", _count(stream, b"\xff\xda") + 1, MAX_SCANS)


def _check_png(stream: IO[bytes]) -> None:
    stream.seek(8)
    chunks = others = texts = 0
    found_once = set[str]()
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        chunks, others = chunks + 1, others + (kind not in (b"IDAT", b"fdAT"))
        _check("chunks", chunks, MAX_CHUNKS)
        _check("chunks without pixels", others, MAX_SEGMENTS)
        if kind in _ONCE:
            _check_once(f"{kind.decode().strip()} chunk", found_once)
        texts += kind in (b"zTXt", b"iTXt")
        _check("texts that may be compressed", texts, MAX_COMPRESSED_TEXTS)
        if kind == b"cHRM":
            _check("bytes of chromaticities", length, MAX_CHROMATICITY_BYTES)
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
    found_once = set[str]()
    while len(head := stream.read(8)) == 8:
        kind, length = struct.unpack("<4sI", head)
        chunks += 1
        _check("chunks", chunks, MAX_CHUNKS)
        if kind in _ONCE:
            _check_once(f"{kind.decode().strip()} chunk", found_once)
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
    _ExifBounds().add(data)


class _ExifBounds:
    """The bounds on all EXIF data of one file."""

    def __init__(self) -> None:
        self._tags = self._size = 0

    def add(self, data: bytes) -> None:
        """Check further EXIF data of the file, as `check_exif` does."""
        _check("bytes of EXIF", len(data), MAX_EXIF_BYTES)
        data = _EXIF_MARKS.sub(b"", data, count=1)
        order = {b"II": "<", b"MM": ">"}.get(data[:2])
        if order is None or len(data) < 8:
            return
        if 43 in data[2:4]:
            raise ValueError("EXIF data of the form BigTIFF, which no camera writes")
        seen, starts = set[int](), [int(struct.unpack_from(f"{order}I", data, 4)[0])]
        while starts:
            start = starts.pop()
            if start in seen or not 0 <= start <= len(data) - 2:
                continue
            seen.add(start)
            (count,) = struct.unpack_from(f"{order}H", data, start)
            for at in range(start + 2, min(start + 2 + 12 * count, len(data) - 11), 12):
                tag, kind, number, value = struct.unpack_from(f"{order}HHII", data, at)
                self._tags += 1
                _check("EXIF tags", self._tags, MAX_EXIF_TAGS)
                if tag in _DIRECTORIES and kind in _PLACES:
                    starts.extend(struct.unpack_from(f"{order}{_PLACES[kind]}", data, at + 8))
                needed = number * _TYPE_BYTES.get(kind, 0)
                if needed > 4 and value + needed <= len(data):  # a decoder passes over the others
                    self._size += needed
                    _check("bytes of EXIF values", self._size, MAX_EXIF_BYTES)


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


def _check_once(name: str, found: set[str]) -> None:
    """Record a segment or chunk that a file may have once."""
    if name in found:
        raise ValueError(f"more than one {name}, expected one at most")
    found.add(name)


def _check(unit: str, number: int, most: int) -> None:
    if number > most:
        raise ValueError(f"more than {most:,} {unit}")

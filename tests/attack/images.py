"""Image files that are damaged, lie about themselves, or make a decoder work for ever.

`cases` yields (name, bytes of the file); `run` reads a file's metadata, as `latentrt inspect` does, and loads it as an
input image, as `latentrt run --image` does.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from latentrt.errors import LatentRTError
from latentrt.images.files import RECORD, encode_texts
from latentrt.images.inputs import load_image
from latentrt.images.metadata import read_metadata

__all__ = ["cases", "png_chunk", "run"]

TIFF = b"Exif\0\0II*\0"
HOSTILE = "\x1b]0;x\x07[red][/]\u202e"


def cases() -> Iterator[tuple[str, bytes]]:
    """Yield every case."""
    yield from _jpegs()
    yield from _pngs()
    yield from _webps()
    yield from _records()
    for extension, data in (("png", _image("PNG")), ("jpeg", _image("JPEG")), ("webp", _image("WEBP"))):
        for length in (0, 1, 3, 12, 40, len(data) // 2, len(data) - 1):
            yield f"{extension} cut at {length}", data[:length]
        for at in (5, 13, 21, 30):
            yield f"{extension} with ff at {at}", data[:at] + b"\xff\xff\xff\xff" + data[at + 4 :]
        yield f"{extension} followed by a zip", data + b"PK\x03\x04" * 100
    yield "a TIFF", _image("TIFF")
    yield "a GIF", _image("GIF")
    yield (
        "a BMP of 2^31 pixels",
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 2**31 - 1, 1, 1, 24, 0, 0, 0, 0, 0, 0),
    )
    yield "text", b"#!/bin/sh\n" * 100


def _image(file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    Image.fromarray(pixels).save(stream, file_format, **options)
    return stream.getvalue()


def _segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def _exif(entries: int, *, count: int = 0xFFFF, kind: int = 7) -> bytes:
    """Return EXIF data with so many tags that all have the same long value."""
    tags = b"".join(struct.pack("<HHII", tag, kind, count, 0) for tag in range(entries))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, entries) + tags + bytes(4)


def _overlapping(entries: int, *, size: int = 1_000_000, kind: int = 7) -> bytes:
    """Return EXIF data with so many tags that all have the same value of `size` bytes."""
    number, place = size // {5: 8, 7: 1}[kind], 10 + 12 * entries + 4
    tags = b"".join(struct.pack("<HHII", 1 + tag, kind, number, place) for tag in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + tags + bytes(4 + size)


def _many_segments(exif: bytes) -> bytes:
    """Return EXIF data in as many segments of a JPEG as it takes."""
    return b"".join(_segment(0xE1, b"Exif\0\0" + exif[at : at + 65_000]) for at in range(0, len(exif), 65_000))


def _jpegs() -> Iterator[tuple[str, bytes]]:
    data = _image("JPEG")
    start, rest = data[:2], data[2:]
    large = bytes(65_000)
    segments = {
        "5000 APP1 of EXIF": _segment(0xE1, b"Exif\0\0" + bytes(2_000)) * 5000,
        "5000 small APP1 of EXIF": _segment(0xE1, b"Exif\0\0MM\0*") * 5000,
        "3000 APP1 of XMP": _segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + large) * 1000,
        "2000 profiles": _segment(0xE2, b"ICC_PROFILE\0\1\1" + large) * 2000,
        "5000 comments": _segment(0xFE, b"x") * 5000,
        "10 MB of filling": b"\xff" * 10_000_000,
        "a million starts": b"\xff\xd8" * 1_000_000,
        "EXIF that names itself": _segment(0xE1, TIFF + struct.pack("<IHHHIII", 8, 1, 0x8769, 4, 1, 8, 8)),
        "EXIF of 5000 tags of one value": _segment(0xE1, _exif(5000)),
        "EXIF of 1000 tags of 1 MB": _many_segments(_overlapping(1_000)),
        "EXIF of 60000 tags of 1 MB": _many_segments(_overlapping(60_000)),
        "EXIF behind three marks": _segment(0xE1, b"Exif\0\0" * 3 + _overlapping(2_000, size=30_000, kind=5)),
        "EXIF behind a stray byte": b"x" + _segment(0xE1, b"Exif\0\0" + _exif(5000)),
        "EXIF behind an extension": b"\xff\xf0" + _segment(0xE1, b"Exif\0\0" + _exif(5000)),
        "10 MB of stray bytes": bytes(10_000_000),
        "MPF of fractions": _segment(0xE2, b"MPF\0" + _overlapping(2_000, size=30_000, kind=5)),
        "EXIF of fractions": _segment(0xE1, _exif(5000, count=8000, kind=5)),
        "EXIF beyond its end": _segment(0xE1, TIFF + struct.pack("<IHHHII", 8, 1, 0x010E, 2, 2**31, 2**31)),
        "an orientation of 2^32": _segment(
            0xE1, b"Exif\0\0II*\0" + struct.pack("<IHHHIII", 8, 1, 0x0112, 4, 1, 2**32 - 1, 0)
        ),
        "XMP with an orientation": _segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="9"/>'),
        "Photoshop blocks": _segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 4000),
        "MPF": _segment(0xE2, b"MPF\0II*\0" + struct.pack("<IH", 8, 0xFFFF)),
        "a segment without a length": b"\xff\xe1\0\0",
    }
    for name, found in segments.items():
        yield f"jpeg with {name}", start + found + rest
    repeated = {
        "segments of Photoshop blocks": _segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\0" * 5400),
        "lists of 1990 images": _segment(0xE2, b"MPF\0" + _exif(1990, count=4, kind=1)[6:]),
        "lists of overlapping values": _segment(0xE2, b"MPF\0" + _overlapping(60, size=60_000)),
        "frames of 21000 channels": _segment(0xC0, struct.pack(">BHHB", 8, 16, 16, 3) + bytes(63_000)),
        "segments of 1000 tables": _segment(0xDB, bytes(65 * 1000)),
    }
    for name, found in repeated.items():
        yield f"jpeg with 1990 {name}", start + found * 1990 + rest
    progressive = _image("JPEG", progressive=True)
    scan = progressive.rindex(b"\xff\xda")
    yield "jpeg of 20000 scans", progressive[:scan] + progressive[scan:-2] * 20_000 + progressive[-2:]
    frame = data.index(b"\xff\xc0")
    yield "jpeg of 65535 × 65535", data[: frame + 5] + b"\xff\xff\xff\xff" + data[frame + 9 :]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG, with its sum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _pngs() -> Iterator[tuple[str, bytes]]:
    data = _image("PNG")
    head, rest = data[:33], data[33:]  # after IHDR
    bomb = zlib.compress(bytes(50_000_000), 1)
    packed = zlib.compress(bytes((1 << 20) - 1), 9)
    wrong = packed[:-1] + bytes([packed[-1] ^ 1])  # the sum: a decoder unpacks all, and passes over the chunk
    chunks = {
        "zTXt of 50 MB": png_chunk(b"zTXt", b"parameters\0\0" + bomb),
        "200 zTXt of 50 MB": png_chunk(b"zTXt", b"parameters\0\0" + bomb) * 200,
        "iTXt of 50 MB": png_chunk(b"iTXt", b"latentrt\0\1\0\0\0" + bomb),
        "a profile of 50 MB": png_chunk(b"iCCP", b"x\0\0" + bomb),
        "1990 profiles": png_chunk(b"iCCP", b"n\0\0" + packed) * 1990,
        "1990 zTXt with a wrong sum": png_chunk(b"zTXt", b"a\0\0" + wrong) * 1990,
        "1990 iTXt with a wrong sum": png_chunk(b"iTXt", b"a\0\1\0\0\0" + wrong) * 1990,
        "1900 eXIf": png_chunk(b"eXIf", _exif(1990, count=4, kind=1)[6:]) * 1900,
        "chromaticities of 60 MB": png_chunk(b"cHRM", bytes(60_000_000)),
        "tEXt of 30 MB": png_chunk(b"tEXt", b"parameters\0" + bytes(30_000_000)),
        "100000 tEXt": png_chunk(b"tEXt", b"parameters\0x") * 100_000,
        "eXIf of 30 MB": png_chunk(b"eXIf", bytes(30_000_000)),
        "eXIf of 1000 tags of 1 MB": png_chunk(b"eXIf", _overlapping(1_000)),
        "EXIF of 1000 tags of 1 MB as text": png_chunk(
            b"tEXt", b"Raw profile type exif\0\nexif\n  8\n" + _overlapping(1_000).hex().encode()
        ),
        "eXIf of 60000 tags": png_chunk(b"eXIf", _exif(60_000)[6:]),
        "EXIF as text": png_chunk(b"tEXt", b"Raw profile type exif\0" + b"\nexif\n  8\nzz"),
        "a text without an end": png_chunk(b"tEXt", b"parameters"),
        "hostile text": png_chunk(b"iTXt", f"parameters\0\0\0\0\0{HOSTILE}".encode()),
        "a text that is no UTF-8": png_chunk(b"iTXt", b"parameters\0\0\0\0\0\xff\xfe"),
        "10^6 frames": png_chunk(b"acTL", struct.pack(">II", 10**6, 0)),
        "a chunk of 2^32 bytes": struct.pack(">I", 2**32 - 1) + b"tEXt",
        "a chunk without a name": png_chunk(b"\0\0\0\0", b""),
        "a second header": png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)),
    }
    for name, found in chunks.items():
        yield f"png with {name}", head + found + rest
    for width, height in ((2**31 - 1, 2**31 - 1), (60_000, 60_000), (1, 2**31 - 1), (0, 0), (9_400, 9_400)):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        yield f"png of {width} × {height}", data[:8] + png_chunk(b"IHDR", header) + rest
    pixels = zlib.compress(bytes(9_000 * (9_000 * 3 + 1)), 1)
    header = struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0)
    yield "png of 81 million pixels", data[:8] + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", pixels) + rest[-12:]
    yield "png of 300000 pieces", head + png_chunk(b"IDAT", b"") * 300_000 + rest


def _webps() -> Iterator[tuple[str, bytes]]:
    def webp(*chunks: tuple[bytes, bytes]) -> bytes:
        body = b"WEBP" + b"".join(k + struct.pack("<I", len(d)) + d + b"\0" * (len(d) % 2) for k, d in chunks)
        return b"RIFF" + struct.pack("<I", len(body)) + body

    own = (b"VP8 ", _image("WEBP")[20:])
    canvas = struct.pack("<I", 0x08) + (15).to_bytes(3, "little") * 2
    huge = struct.pack("<I", 0x02) + (16_382).to_bytes(3, "little") * 2
    yield "webp of 2^28 pixels", webp((b"VP8X", huge), own)
    yield "webp of 2^48 pixels", webp((b"VP8X", bytes(4) + b"\xff" * 6), own)
    yield "webp, lossless, of 2^28 pixels", webp((b"VP8L", b"\x2f\xff\xff\xff\xff" + bytes(100)))
    yield "webp with EXIF of 10 MB", webp((b"VP8X", canvas), own, (b"EXIF", bytes(10_000_000)))
    yield "webp with EXIF of 1000 tags of 1 MB", webp((b"VP8X", canvas), own, (b"EXIF", _overlapping(1_000)))
    yield "webp with EXIF of 60000 tags", webp((b"VP8X", canvas), own, (b"EXIF", _exif(60_000)[6:]))
    many = (b"EXIF", _exif(1990, count=4, kind=1)[6:])
    yield "webp with 11000 EXIF", webp((b"VP8X", canvas), own, *[many] * 11_000)
    yield "webp of 300000 chunks", webp((b"VP8X", canvas), own, *[(b"XXXX", b"")] * 300_000)
    yield "webp that is longer than itself", webp(own)[:4] + b"\xff\xff\xff\xff" + webp(own)[8:]
    yield "webp without chunks", webp()


def _records() -> Iterator[tuple[str, bytes]]:
    for name, text in {
        "nested": "[" * 100_000,
        "of another kind": "[1, 2]",
        "with a key twice": '{"prompt": "a", "prompt": "b"}',
        "of 10 MB": '{"prompt": "' + "a" * 10_000_000 + '"}',
        "of a number": '{"seed": ' + "9" * 10_000 + "}",
        "hostile": '{"prompt": "\\u001b[2J"}',
        "of NaN": '{"prompt": NaN}',
    }.items():
        for file_format in ("PNG", "WEBP"):
            yield (
                f"{file_format.lower()} with a record {name}",
                _image(file_format, **encode_texts(file_format, {RECORD: text})),
            )


def run(data: bytes, folder: Path) -> LatentRTError | None:
    """Read the metadata of a file, and load it as an input image."""
    place = folder / "image"
    place.write_bytes(data)
    with contextlib.suppress(LatentRTError):
        read_metadata(place)
    try:
        load_image(place)
    except LatentRTError as error:
        return error
    return None

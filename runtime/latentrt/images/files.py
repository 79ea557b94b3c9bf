"""Image files: uint8 pixels to Pillow images, PNG, JPEG and WebP reading and writing, and the texts a file carries.

A PNG holds text as key and value chunks. JPEG and WebP hold it in EXIF: other tools read the generation parameters from
`UserComment`, and latentrt's record, which is ASCII, is stored in `ImageDescription`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from latentrt.bundle.atomic_file import write_atomically
from latentrt.bundle.digests import open_regular, read_at_most
from latentrt.bundle.printable import printable, quote
from latentrt.errors import LatentRTError, OutputError, RequestError
from latentrt.images.structure import check_structure

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_PIXELS",
    "PARAMETERS",
    "RECORD",
    "check_folder",
    "check_output",
    "choose_format",
    "decode_image",
    "encode",
    "encode_texts",
    "find_extension",
    "find_file",
    "find_format",
    "make_folder",
    "open_image",
    "read_file",
    "read_texts",
    "save",
    "to_images",
    "translating_decoder_errors",
]

Pixels = NDArray[np.uint8]

PARAMETERS, RECORD = "parameters", "latentrt"
"""The keys of the two texts that latentrt writes into a file."""

MAX_FILE_BYTES = 256 << 20
"""Largest image file that is read."""
# Pillow's own default (a quarter of a GiB of RGB), repeated because a program may lift Pillow's limit for itself.
MAX_PIXELS = (1 << 30) // 4 // 3
"""Largest image, in pixels, that is decoded."""

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Pillow's defaults for JPEG are visible in smooth gradients: quality 75 and colour at half the resolution.
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 95, "subsampling": 0},
    "WEBP": {"quality": 95},
}

# Tag numbers of the EXIF standard (CIPA DC-008), tables 3 and 8.
_IMAGE_DESCRIPTION, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x8769, 0x9286
# Cameras and other tools use ImageDescription too; this prefix marks latentrt's record.
_RECORD_PREFIX = "latentrt "
# A JPEG segment states its length in 16 bits, and the length includes these two bytes.
_MAX_JPEG_EXIF_BYTES = 0xFFFF - 2


def to_images(pixels: Pixels) -> list[Image.Image]:
    """Convert uint8 pixels [images, height, width, 3] into RGB Pillow images.

    Raises:
        RequestError: the array has another shape or dtype.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise RequestError(f"got pixels {pixels.dtype} {pixels.shape}, expected uint8 (images, height, width, 3)")
    return [Image.fromarray(image) for image in pixels]


def check_output(path: str | os.PathLike[str], texts: Mapping[str, str] | None = None) -> None:
    """Reject a path that no image can be written to, before any image is generated.

    Args:
        texts: the texts that the file will carry, as far as they are known.

    Raises:
        OutputError: the extension is unknown, the folder is missing or not writable, or the path is a folder.
    """
    path = Path(path)
    encode_texts(_format(path), texts or {})
    find_file(path)
    check_folder(path)


def find_file(path: Path) -> bool:
    """Return whether there is a file at a path, before an image is written there.

    Raises:
        OutputError: no image can be written there: the name is too long, or that of a folder or a device.
    """
    with _translating_write_errors(path):
        try:
            mode = os.stat(path).st_mode  # fails for a name that is too long, and for a loop of links
        except FileNotFoundError:
            return path.is_symlink()  # one that leads nowhere
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path} is not a file, expected the path of an image to write")
    return True


def check_folder(path: Path, *, make: bool = False) -> None:
    """Reject the path of a file whose folder is missing or not writable.

    Args:
        make: check the first existing folder above, as missing ones will be made (`make_folder`).

    Raises:
        OutputError: the folder is missing, not a folder, or not writable.
    """
    with _translating_write_errors(path):
        folder = path.resolve().parent
        while make and not folder.exists() and folder != folder.parent:
            folder = folder.parent
        # Only an attempt is conclusive: permissions, quotas and read-only disks fail in many ways.
        with tempfile.TemporaryFile(dir=folder):
            pass


def make_folder(path: Path) -> None:
    """Make the folder of a file, and those above it.

    Raises:
        OutputError: that is not possible.
    """
    with _translating_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)


def encode(image: Image.Image, file_format: str, texts: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of an image file.

    Args:
        file_format: `PNG`, `JPEG` or `WEBP`.
        texts: the texts that the file carries (`latentrt.images.metadata.record_texts`).

    Raises:
        OutputError: the image or the texts do not fit the format.
    """
    options = _SAVE_OPTIONS[file_format] | encode_texts(file_format, texts or {})
    encoded = io.BytesIO()
    try:
        image.save(encoded, file_format, **options)
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(f"the image cannot be written as {file_format}: {error}; save a .png") from error
    return encoded.getvalue()


def save(
    image: Image.Image,
    path: str | os.PathLike[str],
    texts: Mapping[str, str] | None = None,
    file_format: str | None = None,
) -> None:
    """Write an image file. A failure leaves an earlier file at that path unchanged.

    Args:
        texts: the texts that the file carries (`latentrt.images.metadata.record_texts`).
        file_format: `PNG`, `JPEG` or `WEBP`; None takes what the extension names.

    Raises:
        OutputError: the extension is unknown, the image does not fit the format, or the file cannot be written.
    """
    path = Path(path)
    data = encode(image, _format(path) if file_format is None else file_format, texts)
    with _translating_write_errors(path):
        write_atomically(path, data)


@contextlib.contextmanager
def _translating_write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _write_error(path, error) from None
    except ValueError as error:  # for a null character
        raise OutputError(f"{path} cannot be written: {error}; choose another path") from None


def choose_format(extension: str, name: str | None, subject: str) -> str:
    """Return the format of a file: `PNG`, `JPEG` or `WEBP`.

    Args:
        extension: of the file, such as `.jpg`; empty where it has none.
        name: `png`, `jpeg` or `webp`; None: as the extension says.
        subject: the file, for the message of an error.

    Raises:
        OutputError: the extension is unknown, or is not that of the named format.
        RequestError: there is no format of that name.
    """
    if name is None:
        return _format(Path(f"image{extension}"), subject)
    found = find_format(name)
    if extension and _FORMATS.get(extension.lower()) != found:
        raise OutputError(
            f"`format`: got {name} for {subject}, whose extension is {extension}; leave out one of the two, or make "
            "them agree"
        )
    return found


def find_format(name: str) -> str:
    """Return the format of a name such as `png`, `JPG` or `webp`: `PNG`, `JPEG` or `WEBP`.

    Raises:
        RequestError: there is no such format.
    """
    found = _FORMATS.get(f".{name.lower()}") if isinstance(name, str) else None
    if found is None:
        raise RequestError(f"`format`: got {quote(name)}, expected one of png, jpeg, webp")
    return found


def find_extension(file_format: str) -> str:
    """Return the usual extension of `PNG`, `JPEG` or `WEBP`, such as `.jpg`."""
    return next(extension for extension, each in _FORMATS.items() if each == file_format)


@contextlib.contextmanager
def open_image(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open a PNG, JPEG or WebP file of unknown origin. Pixels are decoded on first use.

    Raises:
        RequestError: the file is missing, not an image of these formats, damaged or too large; also inside the `with`
            block, where pixels are decoded.
    """
    with translating_decoder_errors(str(path)), open_regular(path) as stream:
        _check_file_size(os.fstat(stream.fileno()).st_size)
        with _open_stream(stream) as image:
            yield image


def read_file(path: str | os.PathLike[str], subject: str) -> bytes:
    """Read the bytes of an image file.

    Args:
        subject: the beginning of an error message, such as "`image`: got cat.png, which".

    Raises:
        RequestError: the file is missing, not a regular file, or larger than `MAX_FILE_BYTES`.
    """
    with translating_decoder_errors(subject), open_regular(path) as stream:
        _check_file_size(os.fstat(stream.fileno()).st_size)
        data = read_at_most(stream, MAX_FILE_BYTES)
        _check_file_size(len(data))  # the file may have grown
    return data


@contextlib.contextmanager
def decode_image(data: bytes, subject: str) -> Iterator[Image.Image]:
    """Open the contents of a PNG, JPEG or WebP file. Pixels are decoded on first use.

    Args:
        subject: the beginning of an error message, such as "`image`: got 20 bytes, which".

    Raises:
        RequestError: as `open_image`.
    """
    with translating_decoder_errors(subject):
        _check_file_size(len(data))
        with _open_stream(io.BytesIO(data)) as image:
            yield image


@contextlib.contextmanager
def _open_stream(stream: IO[bytes]) -> Iterator[Image.Image]:
    check_structure(stream, MAX_PIXELS)
    with Image.open(stream, formats=sorted(set(_FORMATS.values()))) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, expected at most {MAX_PIXELS:,}")
        yield image


@contextlib.contextmanager
def translating_decoder_errors(subject: str) -> Iterator[None]:
    """Raise every failure of Pillow to read an image as `RequestError`, and silence its warnings.

    Args:
        subject: the beginning of the error message, such as "`image`: got cat.png, which".
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except LatentRTError:
        raise
    except UnidentifiedImageError:
        raise RequestError(
            f"{printable(subject)} is not an image that latentrt can read, expected a PNG, JPEG or WebP file"
        ) from None
    # Pillow's readers let errors of many kinds through: OSError, SyntaxError, struct.error, ValueError, IndexError and
    # more. Each means that the file is damaged or hostile.
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else printable(str(error))
        raise RequestError(
            f"{printable(subject)} cannot be read as an image ({reason}), expected a PNG, JPEG or WebP file"
        ) from None


def _format(path: Path, subject: str | None = None) -> str:
    if path.suffix.lower() not in _FORMATS:
        raise OutputError(
            f"{subject or path} has the extension {quote(path.suffix)}, expected one of {', '.join(_FORMATS)}"
        )
    return _FORMATS[path.suffix.lower()]


def _check_file_size(size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{size:,} bytes, expected at most {MAX_FILE_BYTES:,}")


_ADVICE = {
    errno.ENOSPC: "free some space, or choose another path",
    errno.EDQUOT: "free some space, or choose another path",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another path",
    errno.ENOENT: "make its folder first (mkdir -p)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "remove the loop of links, or choose another path",
}


def _write_error(path: Path, error: OSError) -> OutputError:
    advice = _ADVICE.get(error.errno or 0, "choose a path that you may write to")
    return OutputError(f"{path} cannot be written: {error.strerror}; {advice}. An existing file is unchanged")


def encode_texts(file_format: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """Return the keyword arguments with which Pillow's `save` writes texts into an image file.

    Args:
        file_format: `PNG`, `JPEG` or `WEBP`.
        texts: any text under `PARAMETERS`, an ASCII text under `RECORD`.

    Raises:
        OutputError: the texts do not fit into the format.
    """
    if not texts:
        return {}
    if file_format == "PNG":
        chunks = PngInfo()
        for key, text in texts.items():
            chunks.add_text(key, text)  # tEXt for Latin-1, iTXt for everything else
        return {"pnginfo": chunks}
    exif = _encode_exif(texts)
    if file_format == "JPEG" and len(exif) > _MAX_JPEG_EXIF_BYTES:
        raise OutputError(
            f"the prompts make {len(exif):,} bytes of metadata, expected {_MAX_JPEG_EXIF_BYTES:,} at most in a JPEG; "
            "save a .png or .webp"
        )
    return {"exif": exif}


def read_texts(image: Image.Image) -> dict[str, str]:
    """Return the texts of an opened image, written by latentrt or another tool. Does not decode its pixels."""
    if image.format == "PNG":
        # Pillow marks an international text by a subclass of str, which JSON encoders reject.
        return {key: str(text) for key in (PARAMETERS, RECORD) if isinstance(text := image.info.get(key), str)}
    exif = image.getexif()
    texts = {
        PARAMETERS: _decode_user_comment(exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)),
        RECORD: _decode_description(exif.get(_IMAGE_DESCRIPTION)),
    }
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _encode_exif(texts: Mapping[str, str]) -> bytes:
    exif = Image.Exif()
    if RECORD in texts:
        exif[_IMAGE_DESCRIPTION] = _RECORD_PREFIX + texts[RECORD]
    if PARAMETERS in texts:
        exif[_EXIF_IFD] = {_USER_COMMENT: b"UNICODE\0" + texts[PARAMETERS].encode("utf-16-be", "replace")}
    return exif.tobytes()


def _decode_description(description: object) -> str | None:
    if isinstance(description, str) and description.startswith(_RECORD_PREFIX):
        return description.removeprefix(_RECORD_PREFIX)
    return None


def _decode_user_comment(comment: object) -> str | None:
    """Decode an EXIF UserComment, whose first eight bytes name its encoding."""
    if not isinstance(comment, bytes):
        return None
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        # The standard leaves the byte order open. In Latin text every other byte is zero, which tells them apart.
        little_endian = text[1::2].count(0) > text[0::2].count(0)
        return text.decode("utf-16-le" if little_endian else "utf-16-be", "replace")
    return text.decode("utf-8", "replace") if code == b"ASCII\0\0\0" else None

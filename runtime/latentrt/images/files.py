"""How do pixels become pictures, and pictures files?

Pixels are uint8 arrays (images, height, width, 3), pictures are Pillow's, files are PNG, JPEG or WebP.
"""

from __future__ import annotations

import errno
import io
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from latentrt.bundle.atomic_file import write_atomically
from latentrt.bundle.digests import open_regular
from latentrt.bundle.printable import printable
from latentrt.errors import LatentRTError, OutputError, RequestError
from latentrt.images.texts import carry_texts

__all__ = ["check_output", "open_picture", "save", "to_pictures"]

Pixels = NDArray[np.uint8]

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# What Pillow would otherwise choose for JPEG is visible in smooth gradients: quality 75, and colour at half the
# resolution.
_OPTIONS: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"quality": 95}}
_MAX_PICTURE_BYTES = 256 << 20


def to_pictures(pixels: Pixels) -> list[Image.Image]:
    """Pixels (images, height, width, 3) → as many RGB pictures.

    Raises:
        RequestError: the array is not of that shape, or not uint8.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3:
        raise RequestError(f"found pixels {pixels.dtype} {pixels.shape}, expected uint8 (images, height, width, 3)")
    return [Image.fromarray(image) for image in pixels]


def check_output(path: str | os.PathLike[str], texts: Mapping[str, str] | None = None) -> None:
    """Refuse a path that no picture can be written to; ask before the work of drawing one.

    Args:
        texts: what the file is going to say of the picture, as far as it is known.

    Raises:
        OutputError: the extension is unknown, the folder is missing or may not be written to, or a folder stands there.
    """
    place = Path(path)
    carry_texts(_format(place), texts or {})
    if place.exists() and not place.is_file():
        raise OutputError(f"{place} is not a file, expected the path of a picture to write")
    try:
        # Only an attempt tells; permissions, quotas and read-only disks have many ways to refuse.
        with tempfile.TemporaryFile(dir=place.resolve().parent):
            pass
    except OSError as error:
        raise _not_written(place, error) from None


def save(picture: Image.Image, path: str | os.PathLike[str], texts: Mapping[str, str] | None = None) -> None:
    """Write a picture; its extension says in which format. A failure leaves an earlier file at that path as it was.

    Args:
        texts: what the file says of the picture (`latentrt.images.metadata.record_texts`).

    Raises:
        OutputError: the extension is unknown, the picture does not fit the format, or the file cannot be written.
    """
    place = Path(path)
    file_format = _format(place)
    options = _OPTIONS[file_format] | carry_texts(file_format, texts or {})
    encoded = io.BytesIO()
    try:
        picture.save(encoded, file_format, **options)
    except (OSError, ValueError, KeyError) as error:
        raise OutputError(f"{place} cannot be written as {file_format}: {error}; save a .png") from error
    try:
        write_atomically(place, encoded.getvalue())
    except OSError as error:
        raise _not_written(place, error) from None


@contextmanager
def open_picture(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """Open a PNG, JPEG or WebP file of unknown origin. Pixels are not decoded until they are asked for.

    Raises:
        RequestError: there is no such file, or it is no such picture, or damaged or oversized; also where that
            shows only later, inside the `with` block.
    """
    try:
        # The largest picture Pillow opens without complaint is already larger than any that is drawn here.
        with warnings.catch_warnings(), open_regular(path) as stream:
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            _check_length(os.fstat(stream.fileno()).st_size)
            with Image.open(stream, formats=sorted(set(_FORMATS.values()))) as picture:
                yield picture
    except LatentRTError:
        raise
    except UnidentifiedImageError:
        raise RequestError(
            f"{path} is not a picture that latentrt can read, expected a PNG, JPEG or WebP file"
        ) from None
    # Pillow's readers raise what their parts raise: OSError, SyntaxError, struct.error, ValueError, IndexError and
    # more. Whichever it is, hostile or damaged, the picture cannot be read.
    except Exception as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else printable(str(error))
        raise RequestError(f"{path} cannot be read as a picture ({found}), expected a PNG, JPEG or WebP file") from None


def _format(place: Path) -> str:
    if place.suffix.lower() not in _FORMATS:
        raise OutputError(f"{place} has the extension {place.suffix!r}, expected one of {', '.join(_FORMATS)}")
    return _FORMATS[place.suffix.lower()]


def _check_length(size: int) -> None:
    if size > _MAX_PICTURE_BYTES:
        raise ValueError(f"it has {size:,} bytes, more than the {_MAX_PICTURE_BYTES:,} that are read")


_ADVICE = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or choose another place",
    errno.ENOENT: "make its folder first (mkdir -p)",
}


def _not_written(place: Path, error: OSError) -> OutputError:
    advice = _ADVICE.get(error.errno or 0, "choose a place that you may write to")
    return OutputError(f"{place} cannot be written: {error.strerror}; {advice}. What was there is untouched")

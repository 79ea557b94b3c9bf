"""How does a picture file carry text?

PNG has chunks of key and text. JPEG and WebP have EXIF, where two fields serve: other tools read the line of
parameters from `UserComment`, and our record, which is ASCII, stands in `ImageDescription`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from latentrt.errors import OutputError

__all__ = ["PARAMETERS", "RECORD", "carried_texts", "carry_texts"]

PARAMETERS, RECORD = "parameters", "latentrt"

# Numbers of the EXIF standard (CIPA DC-008), tables 3 and 8.
_IMAGE_DESCRIPTION, _EXIF_IFD, _USER_COMMENT = 0x010E, 0x8769, 0x9286
# Cameras and other tools describe pictures too.
_RECORD_MARK = "latentrt "
# A JPEG segment says its length, itself included, in 16 bits.
_MAX_JPEG_EXIF_BYTES = 0xFFFF - 2


def carry_texts(file_format: str, texts: Mapping[str, str]) -> dict[str, Any]:
    """The arguments with which Pillow's `save` writes texts into a picture.

    Args:
        file_format: `PNG`, `JPEG` or `WEBP`.
        texts: of `PARAMETERS` any text, of `RECORD` an ASCII one.

    Raises:
        OutputError: they do not fit into the format.
    """
    if not texts:
        return {}
    if file_format == "PNG":
        chunks = PngInfo()
        for key, text in texts.items():
            chunks.add_text(key, text)  # tEXt, or iTXt for what is not Latin-1
        return {"pnginfo": chunks}
    exif = _exif(texts)
    if file_format == "JPEG" and len(exif) > _MAX_JPEG_EXIF_BYTES:
        raise OutputError(
            f"the prompts make {len(exif):,} bytes of metadata, expected {_MAX_JPEG_EXIF_BYTES:,} at most in a JPEG; "
            "save a .png or .webp"
        )
    return {"exif": exif}


def carried_texts(picture: Image.Image) -> dict[str, str]:
    """The texts of a picture that Pillow has opened, from `carry_texts` or another tool; its pixels are not decoded."""
    if picture.format == "PNG":
        # Pillow marks an international text by a subclass, which JSON encoders do not take.
        return {key: str(text) for key in (PARAMETERS, RECORD) if isinstance(text := picture.info.get(key), str)}
    exif = picture.getexif()
    texts = {
        PARAMETERS: _user_comment(exif.get_ifd(_EXIF_IFD).get(_USER_COMMENT)),
        RECORD: _described_record(exif.get(_IMAGE_DESCRIPTION)),
    }
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _exif(texts: Mapping[str, str]) -> bytes:
    exif = Image.Exif()
    if RECORD in texts:
        exif[_IMAGE_DESCRIPTION] = _RECORD_MARK + texts[RECORD]
    if PARAMETERS in texts:
        exif[_EXIF_IFD] = {_USER_COMMENT: b"UNICODE\0" + texts[PARAMETERS].encode("utf-16-be", "replace")}
    return exif.tobytes()


def _described_record(description: object) -> str | None:
    marked = isinstance(description, str) and description.startswith(_RECORD_MARK)
    return str(description).removeprefix(_RECORD_MARK) if marked else None


def _user_comment(comment: object) -> str | None:
    """The text of an EXIF UserComment: eight bytes name its encoding."""
    if not isinstance(comment, bytes):
        return None
    code, text = comment[:8], comment[8:]
    if code == b"UNICODE\0":
        # The standard leaves the byte order open. Latin text shows it: every other byte is zero.
        little_endian = text[1::2].count(0) > text[0::2].count(0)
        return text.decode("utf-16-le" if little_endian else "utf-16-be", "replace")
    return text.decode("utf-8", "replace") if code == b"ASCII\0\0\0" else None

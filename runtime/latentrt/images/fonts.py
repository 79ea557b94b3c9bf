"""Fonts for text of any script.

A text is written in the first font that has all its characters: Pillow's own, which has ASCII; the subset of Noto Sans
that ships with the package (`NotoSans-subset.ttf`: Latin, Greek and Cyrillic letters); then the fonts of the system.
If none has all, the one that has most writes the text, and the others are escaped (`\\u4e2d`): a character never
becomes an empty box.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageFont, features

from latentrt.bundle.printable import escape, printable

__all__ = ["system_fonts", "typeset"]

_SUBSET = Path(__file__).with_name("NotoSans-subset.ttf")
# Where systems keep fonts: fontconfig's folders, macOS, Windows.
_FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts"),
    *("C:/Windows/Fonts",),
)
# Files that have many scripts or one well, the best first. Fonts of coloured bitmaps have no outline of this size.
_FILES = tuple(
    re.compile(pattern)
    for pattern in (
        r"NotoSans(-Regular|\[[\w,]+\])?\.(ttf|otf)",
        r"DejaVuSans\.ttf",
        r"(segoeui|Nirmala|LeelawUI|ebrima|gadugi)\.tt[fc]",
        r"(msyh|malgun|YuGothR|msjh)\.tt[fc]",
        r"Arial Unicode\.ttf",
        r"(PingFang|Hiragino Sans GB|AppleSDGothicNeo|Kohinoor|Devanagari Sangam MN|GeezaPro|SFArabic)\.tt[fc]",
        r"NotoSans(CJK(jp|sc|tc|kr)?|SC|JP|KR|TC)(-Regular|-VF|\[[\w,]+\])?\.(ttf|otf|ttc)",
        r"NotoSans\w*(-Regular|\[[\w,]+\])\.(ttf|otf)",
        r"(wqy-zenhei|DroidSansFallback(Full)?|unifont)\.(ttf|ttc|otf)",
        r"(NotoEmoji(-Regular|\[wght\])|Symbola|seguiemj|seguisym|Apple Symbols)\.(ttf|otf)",
    )
)
_NO_CHARACTER = "\U0010ffff"  # its glyph is that of a missing character
_MARKS = {"Mn", "Mc", "Me"}  # categories of characters that are placed on others
_RIGHT_TO_LEFT = {"R", "AL"}
# Joiners and variation selectors affect the shape of their neighbours and have none of their own.
_INVISIBLE = {"\u200c", "\u200d", *map(chr, range(0xFE00, 0xFE10))}


@dataclass(frozen=True)
class _Face:
    """A font of one size. `glyphs` is the same font without shaping, which shows the shape of a character alone."""

    font: ImageFont.FreeTypeFont
    glyphs: ImageFont.FreeTypeFont

    @property
    def shapes(self) -> bool:
        """Whether letters are joined, marks placed and lines reversed, which Pillow leaves to raqm and fribidi."""
        return self.font.layout_engine == ImageFont.Layout.RAQM and features.check("fribidi") is True

    def lacks(self, character: str) -> bool:
        if character.isspace() or character in _INVISIBLE:
            return False
        if not self.shapes and _needs_shaping(character):
            return True
        try:
            return bytes(self.glyphs.getmask(character)) == bytes(self.glyphs.getmask(_NO_CHARACTER))
        except OSError:  # the outline is damaged
            return True


def typeset(text: str, size: int) -> tuple[ImageFont.FreeTypeFont, str]:
    """Return a font for a text, and the text with escapes in place of the characters that no font has.

    Args:
        text: one line, which may be cut with "…". Characters that control a terminal or the direction of the line are
            escaped as well.
        size: of the font in pixels.
    """
    text = printable(unicodedata.normalize("NFC", text))
    face, lacking = _best_face(frozenset(f"{text}…"), size)
    visible = text if face.shapes else "".join(c for c in text if c not in _INVISIBLE)
    return face.font, "".join(escape(c) if c in lacking else c for c in visible)


@functools.lru_cache(maxsize=256)
def _best_face(characters: frozenset[str], size: int) -> tuple[_Face, frozenset[str]]:
    """Return the first face that has all of the characters, else one that has most; and those that it lacks."""
    found: tuple[_Face, frozenset[str]] | None = None
    for face in _faces(size):
        lacking = frozenset(filter(face.lacks, characters))
        if found is None or len(lacking) < len(found[1]):
            found = face, lacking
        if not lacking:
            break
    assert found is not None  # Pillow's own font is always there
    return found


def _faces(size: int) -> Iterator[_Face]:
    own = ImageFont.load_default(size)
    assert isinstance(own, ImageFont.FreeTypeFont)
    yield _Face(own, own)
    for file in (_SUBSET, *system_fonts()):
        if face := _open(file, size):
            yield face


@functools.cache
def _open(file: Path, size: int) -> _Face | None:
    try:
        glyphs = ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)
        return _Face(ImageFont.truetype(file, size), glyphs)
    except OSError:  # damaged, or of bitmaps of other sizes
        return None


@functools.cache
def system_fonts() -> tuple[Path, ...]:
    """Return the font files of this system that are tried, the best first."""
    ranked = {
        Path(folder, name): rank
        for root in _FOLDERS
        for folder, _, names in os.walk(os.path.expanduser(root))
        for name in names
        for rank, pattern in reversed([*enumerate(_FILES)])
        if pattern.fullmatch(name)
    }
    return tuple(sorted(ranked, key=lambda file: (ranked[file], file)))


def _needs_shaping(character: str) -> bool:
    return unicodedata.category(character) in _MARKS or unicodedata.bidirectional(character) in _RIGHT_TO_LEFT

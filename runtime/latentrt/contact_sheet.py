"""How are several pictures laid out on one?

In rows, each over its caption. Small pictures are enlarged by a whole number, so that every pixel is still a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from PIL import Image, ImageDraw, ImageFont

from latentrt.errors import RequestError

__all__ = ["contact_sheet"]

_MARGIN = 12  # pixels around each picture
_FONT_SIZE = 13
_LINES = 3  # of a caption; what does not fit is left out, and "…" says so
_PAPER, _INK = "#ffffff", "#333333"

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont | ImageFont.TransposedFont


def contact_sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 4, edge: int = 192
) -> Image.Image:
    """Lay pictures of one size out on a white sheet.

    Args:
        pictures: at least one.
        captions: as many, in the order of the pictures; an empty one leaves its place empty.
        columns: how many in a row.
        edge: pixels that the shorter edge of a picture gets at most, but never less than it has.

    Returns:
        An RGB picture.

    Raises:
        RequestError: there are no pictures, another number of captions, or pictures of several sizes.
    """
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1 or len(captions) != len(pictures) or columns < 1:
        raise RequestError(
            f"found {len(pictures)} pictures of sizes {sorted(sizes)}, {len(captions)} captions and {columns} columns, "
            "expected at least one picture, one size, as many captions and at least one column"
        )
    size = sizes.pop()
    scale = max(1, edge // min(size))
    width, height = (length * scale for length in size)
    columns = min(columns, len(pictures))
    font: Font = ImageFont.load_default(_FONT_SIZE)
    below = _LINES * (_FONT_SIZE + 4) if any(captions) else 0
    cell = (width + _MARGIN, height + _MARGIN + below)
    rows = ceil(len(pictures) / columns)
    sheet = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = _MARGIN + index % columns * cell[0], _MARGIN + index // columns * cell[1]
        sheet.paste(picture.convert("RGB").resize((width, height), Image.Resampling.NEAREST), (x, y))
        for line, text in enumerate(_wrapped(caption, width, pen, font)):
            pen.text((x, y + height + 4 + line * (_FONT_SIZE + 4)), text, fill=_INK, font=font)
    return sheet


def _wrapped(text: str, width: int, pen: ImageDraw.ImageDraw, font: Font) -> list[str]:
    """The lines of a caption, each at most `width` pixels long."""

    def fits(line: str) -> bool:
        return pen.textlength(line, font=font) <= width

    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    shown = lines[:_LINES]
    for index, line in enumerate(shown):
        cut = len(lines) > _LINES and index == _LINES - 1
        while not fits(f"{line}…" if cut else line) and line:
            line, cut = line[:-1], True
        shown[index] = f"{line}…" if cut else line
    return shown

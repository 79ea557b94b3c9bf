"""How are several pictures laid out on one?

In rows, each over its caption; rows and columns may have headings. Small pictures are enlarged by a whole number, so
that every pixel is still a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from PIL import Image, ImageDraw, ImageFont

from latentrt.errors import RequestError

__all__ = ["contact_sheet"]

_MARGIN = 12  # pixels around each picture
_FONT_SIZE = 13
_LINE = _FONT_SIZE + 4  # pixels from one line of text to the next
_LINES = 3  # of a caption; what does not fit is left out, and "…" says so
_PAPER, _INK, _EMPTY = "#ffffff", "#333333", "#eeeeee"

Font = ImageFont.ImageFont | ImageFont.FreeTypeFont | ImageFont.TransposedFont


def contact_sheet(
    pictures: Sequence[Image.Image | None],
    captions: Sequence[str],
    *,
    columns: int = 4,
    edge: int = 192,
    row_headings: Sequence[str] = (),
    column_headings: Sequence[str] = (),
) -> Image.Image:
    """Lay pictures of one size out on a white sheet.

    Args:
        pictures: row by row, at least one; None leaves its place grey.
        captions: as many, in the order of the pictures; where all are empty there is no room for any.
        columns: how many in a row.
        edge: pixels that the shorter edge of a picture gets at most, but never less than it has.
        row_headings, column_headings: one for each row, on its left, and one for each column, above it; or none.

    Returns:
        An RGB picture.

    Raises:
        RequestError: there are no pictures, pictures of several sizes, or another number of captions or headings.
    """
    cell = _cell_size(pictures, captions, columns, edge)
    columns = min(columns, len(pictures))
    rows = ceil(len(pictures) / columns)
    for found, expected, which in ((row_headings, rows, "rows"), (column_headings, columns, "columns")):
        if found and len(found) != expected:
            raise RequestError(f"found {len(found)} headings for {expected} {which}, expected one for each, or none")
    font: Font = ImageFont.load_default(_FONT_SIZE)
    layout = _Layout(
        columns=columns,
        rows=rows,
        width=cell[0],
        height=cell[1],
        left=max((ceil(font.getlength(text)) + _MARGIN for text in row_headings), default=0),
        above=_LINE if column_headings else 0,
        below=_LINES * _LINE if any(captions) else 0,
    )
    sheet = Image.new("RGB", layout.size, _PAPER)
    for index, picture in enumerate(pictures):
        sheet.paste(_EMPTY if picture is None else _enlarged(picture, cell), layout.box(index))
    _write(ImageDraw.Draw(sheet), font, layout, captions, row_headings, column_headings)
    return sheet


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where everything is, in pixels. Pictures are `width` × `height`, the rest is room for text around them."""

    columns: int
    rows: int
    width: int
    height: int
    left: int
    above: int
    below: int

    @property
    def size(self) -> tuple[int, int]:
        width = self.left + self.columns * (self.width + _MARGIN) + _MARGIN
        return width, self.above + self.rows * (self.height + _MARGIN + self.below) + _MARGIN

    def corner(self, index: int) -> tuple[int, int]:
        """The upper left corner of a picture."""
        row, column = divmod(index, self.columns)
        x = self.left + _MARGIN + column * (self.width + _MARGIN)
        return x, self.above + _MARGIN + row * (self.height + _MARGIN + self.below)

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Left, upper, right and lower edge of a picture."""
        x, y = self.corner(index)
        return x, y, x + self.width, y + self.height


def _cell_size(
    pictures: Sequence[Image.Image | None], captions: Sequence[str], columns: int, edge: int
) -> tuple[int, int]:
    """Width and height of the enlarged pictures."""
    sizes = {picture.size for picture in pictures if picture is not None}
    if len(sizes) != 1 or len(captions) != len(pictures) or columns < 1:
        raise RequestError(
            f"found {len(pictures)} pictures of sizes {sorted(sizes)}, {len(captions)} captions and {columns} columns, "
            "expected at least one picture, one size, as many captions and at least one column"
        )
    width, height = sizes.pop()
    scale = max(1, edge // min(width, height))
    return width * scale, height * scale


def _enlarged(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _write(
    pen: ImageDraw.ImageDraw,
    font: Font,
    layout: _Layout,
    captions: Sequence[str],
    row_headings: Sequence[str],
    column_headings: Sequence[str],
) -> None:
    for index, caption in enumerate(captions):
        x, _, _, y = layout.box(index)
        for line, text in enumerate(_wrapped(caption, layout.width, pen, font)):
            pen.text((x, y + 4 + line * _LINE), text, fill=_INK, font=font)
    for row, text in enumerate(row_headings):
        y = layout.corner(row * layout.columns)[1] + (layout.height - _LINE) // 2
        pen.text((_MARGIN, y), text, fill=_INK, font=font)
    for column, heading in enumerate(column_headings):
        for text in _wrapped(heading, layout.width, pen, font)[:1]:
            pen.text((layout.corner(column)[0], _MARGIN - 4), text, fill=_INK, font=font)


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

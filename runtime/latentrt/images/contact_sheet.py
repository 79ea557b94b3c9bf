"""Contact sheets: several images laid out in rows on one, with captions below them and optional headings.

Small images are enlarged by a whole number, so that every pixel stays a square.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from PIL import Image, ImageDraw
from PIL.ImageFont import FreeTypeFont

from latentrt.errors import RequestError
from latentrt.images.fonts import typeset

__all__ = ["contact_sheet"]

_MARGIN = 12  # pixels around each image
_FONT_SIZE = 13
_LINE = _FONT_SIZE + 4  # pixels from one line of text to the next
_ASCENT = 13  # pixels from the top of a line to its baseline, whichever font it is in
_LINES = 3  # of a caption; a longer one ends in "…"
_PAPER, _INK, _EMPTY = "#ffffff", "#333333", "#eeeeee"

# A line may break after each Chinese character, kana and Hangul, and before an escape.
_BREAK = re.compile(
    r"(?<=[\u2e80-\u9fff\uac00-\ud7ff\uf900-\ufaff\uff00-\uff60\U00020000-\U0003ffff])|(?=\\u[0-9a-f]{4}|\\U[0-9a-f]{8})"
)


def contact_sheet(
    images: Sequence[Image.Image | None],
    captions: Sequence[str],
    *,
    columns: int = 4,
    edge: int = 192,
    row_headings: Sequence[str] = (),
    column_headings: Sequence[str] = (),
) -> Image.Image:
    """Lay images of one size out on a white sheet.

    Args:
        images: at least one, row by row; None leaves a grey cell.
        captions: one for each image; if all are empty, no space is reserved for them.
        columns: images in a row.
        edge: the shorter edge of an enlarged image in pixels, at most; no image is reduced.
        row_headings, column_headings: one for each row, on its left, and one for each column, above it; or none.

    Returns:
        An RGB image.

    Raises:
        RequestError: no images, images of several sizes, or a wrong number of captions or headings.
    """
    cell = _cell_size(images, captions, columns, edge)
    columns = min(columns, len(images))
    rows = ceil(len(images) / columns)
    for headings, expected, which in ((row_headings, rows, "rows"), (column_headings, columns, "columns")):
        if headings and len(headings) != expected:
            raise RequestError(f"got {len(headings)} headings for {expected} {which}, expected one for each, or none")
    layout = _Layout(
        columns=columns,
        rows=rows,
        width=cell[0],
        height=cell[1],
        left=max((_length(*typeset(text, _FONT_SIZE)) + _MARGIN for text in row_headings), default=0),
        above=_LINE if column_headings else 0,
        below=_LINES * _LINE if any(captions) else 0,
    )
    sheet = Image.new("RGB", layout.size, _PAPER)
    for index, image in enumerate(images):
        sheet.paste(_EMPTY if image is None else _enlarge(image, cell), layout.box(index))
    _write(ImageDraw.Draw(sheet), layout, captions, row_headings, column_headings)
    return sheet


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Positions on the sheet, in pixels. `left`, `above` and `below` are the space for text around the images."""

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
        """Return x and y of the upper left corner of an image."""
        row, column = divmod(index, self.columns)
        x = self.left + _MARGIN + column * (self.width + _MARGIN)
        return x, self.above + _MARGIN + row * (self.height + _MARGIN + self.below)

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Return the left, upper, right and lower edge of an image."""
        x, y = self.corner(index)
        return x, y, x + self.width, y + self.height


def _cell_size(
    images: Sequence[Image.Image | None], captions: Sequence[str], columns: int, edge: int
) -> tuple[int, int]:
    """Return width and height of the enlarged images."""
    sizes = {image.size for image in images if image is not None}
    if len(sizes) != 1 or len(captions) != len(images) or columns < 1:
        raise RequestError(
            f"got {len(images)} images of sizes {sorted(sizes)}, {len(captions)} captions and {columns} columns, "
            "expected at least one image, one size, as many captions and at least one column"
        )
    width, height = sizes.pop()
    scale = max(1, edge // min(width, height))
    return width * scale, height * scale


def _enlarge(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image.convert("RGB").resize(size, Image.Resampling.NEAREST)


def _write(
    pen: ImageDraw.ImageDraw,
    layout: _Layout,
    captions: Sequence[str],
    row_headings: Sequence[str],
    column_headings: Sequence[str],
) -> None:
    for index, caption in enumerate(captions):
        x, _, _, y = layout.box(index)
        font, caption = typeset(caption, _FONT_SIZE)
        for line, text in enumerate(_wrap(caption, layout.width, font)):
            _write_line(pen, (x, y + 4 + line * _LINE), text, font)
    for row, heading in enumerate(row_headings):
        y = layout.corner(row * layout.columns)[1] + (layout.height - _LINE) // 2
        font, heading = typeset(heading, _FONT_SIZE)
        _write_line(pen, (_MARGIN, y), heading, font)
    for column, heading in enumerate(column_headings):
        font, heading = typeset(heading, _FONT_SIZE)
        for text in _wrap(heading, layout.width, font)[:1]:
            _write_line(pen, (layout.corner(column)[0], _MARGIN - 4), text, font)


def _write_line(pen: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, font: FreeTypeFont) -> None:
    """Write a line whose upper left corner is at x, y."""
    pen.text((corner[0], corner[1] + _ASCENT), text, fill=_INK, font=font, anchor="ls")


def _length(font: FreeTypeFont, text: str) -> int:
    """Return the width of a line in pixels."""
    return ceil(font.getlength(text))


def _wrap(text: str, width: int, font: FreeTypeFont) -> list[str]:
    """Break a caption into at most `_LINES` lines of at most `width` pixels; "…" ends a line that is cut."""
    lines: list[str] = []
    for gap, piece in _pieces(text):
        # No font has a letter narrower than a pixel, so more letters than pixels cannot fit.
        longer = f"{lines[-1]}{gap}{piece}" if lines else piece
        if lines and len(longer) <= width and font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) > _LINES:
            break
        else:
            lines.append(piece)
    shown = lines[:_LINES]
    for index, line in enumerate(shown):
        shortened = len(lines) > _LINES and index == _LINES - 1
        if len(line) > width:
            line, shortened = line[:width], True
        while line and font.getlength(f"{line}…" if shortened else line) > width:
            line, shortened = line[:-1], True
        shown[index] = f"{line}…" if shortened else line
    return shown


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    """Yield what a line may not break inside of, each with the space before it, or none."""
    for word in text.split():
        for index, piece in enumerate(filter(None, _BREAK.split(word))):
            yield "" if index else " ", piece

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from latentrt.errors import RequestError
from latentrt.images.contact_sheet import contact_sheet


def make_images(count: int, size: tuple[int, int] = (8, 4)) -> list[Image.Image]:
    return [Image.new("RGB", size, (10 * index, 0, 0)) for index in range(count)]


def test_images_are_laid_out_in_rows() -> None:
    sheet = np.asarray(contact_sheet(make_images(5), [""] * 5, columns=3, edge=8))
    assert sheet.shape == (2 * (8 + 12) + 12, 3 * (16 + 12) + 12, 3)
    for index in range(5):
        y, x = 12 + index // 3 * 20, 12 + index % 3 * 28
        assert (sheet[y : y + 8, x : x + 16] == [10 * index, 0, 0]).all()
    assert (sheet[:12] == 255).all()
    assert (sheet[32:40, 68:84] == 255).all()  # the sixth place is empty


def test_captions_are_below() -> None:
    plain = np.asarray(contact_sheet(make_images(1), [""], edge=8))
    sheet = np.asarray(contact_sheet(make_images(1, (64, 64)), ["a large red circle on a blue background"], edge=192))
    assert plain.shape[0] == 8 + 2 * 12
    below = sheet[12 + 192 :]
    assert (below < 128).any()
    assert (sheet[:, -12:] == 255).all()  # nothing sticks out


@pytest.mark.parametrize("caption", ["word " * 200, "x" * 80, "a " + "x" * 80, "ä" * 500])
def test_a_long_caption_is_shortened(caption: str) -> None:
    """It stays in its own cell: below its image, above the sheet's end, and beside the next."""
    sheet = np.asarray(contact_sheet(make_images(2, (64, 64)), [caption, ""], edge=64))
    assert (sheet[12 + 64 : -10, 12 : 12 + 64] < 128).any()
    assert (sheet[-10:] == 255).all()
    assert (sheet[12 + 64 :, 12 + 64 + 1 :] == 255).all()


def test_a_shortened_caption_ends_in_an_ellipsis() -> None:
    def below(caption: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return np.asarray(contact_sheet(make_images(1, (64, 64)), [caption], edge=64))

    # The omitted rest does not matter: the same three lines, the last with "…".
    assert np.array_equal(below("words words words " + "more"), below("words words words " + "less"))
    assert not np.array_equal(below("words words words " + "more"), below("words words words"))


def test_large_images_keep_their_size() -> None:
    assert contact_sheet(make_images(1, (300, 200)), [""], edge=100).size == (324, 224)


@pytest.mark.parametrize(
    ("count", "captions", "columns", "message"),
    [
        (0, 0, 4, "got 0 images"),
        (2, 1, 4, "1 captions"),
        (1, 1, 0, "0 columns"),
    ],
)
def test_wrong_counts_are_refused(count: int, captions: int, columns: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        contact_sheet(make_images(count), ["x"] * captions, columns=columns)


def test_images_of_two_sizes_are_refused() -> None:
    with pytest.raises(RequestError, match=r"sizes \[\(8, 4\), \(9, 4\)\]"):
        contact_sheet([*make_images(1), *make_images(1, (9, 4))], ["", ""])


def test_headings_are_left_of_the_rows_and_above_the_columns() -> None:
    plain = np.asarray(contact_sheet(make_images(6), [""] * 6, columns=3, edge=40))
    headed = np.asarray(
        contact_sheet(
            make_images(6),
            [""] * 6,
            columns=3,
            edge=40,
            row_headings=("euler", "dpmpp_2m_karras"),
            column_headings=("5 steps", "10 steps", "a heading too long for its column"),
        )
    )
    above, left = (headed.shape[axis] - plain.shape[axis] for axis in (0, 1))
    assert above == 17
    assert 90 < left < 140, "as wide as the longest name"
    # Apart from the space of the headings, the images keep their places.
    assert np.array_equal(headed[above + 12 :, left + 12 :], plain[12:, 12:])
    for row in range(2):
        place = headed[above + 12 + row * 52 :][:40]
        assert (place[:, 12:left] < 128).any()
        assert (place[:, left : left + 12] == 255).all()
    for column in range(3):
        x = left + 12 + column * 92
        assert (headed[: above + 8, x : x + 80] < 128).any()
        assert (headed[: above + 12, x + 80 : x + 92] == 255).all(), "nothing sticks out"


def test_an_empty_cell_keeps_its_caption() -> None:
    only, *_ = make_images(1, (64, 64))
    sheet = np.asarray(contact_sheet([None, only], ["no such thing", ""], edge=64))
    assert (sheet[12 : 12 + 64, 12 : 12 + 64] == 0xEE).all()
    assert (sheet[12 + 64 :, 12 : 12 + 64] < 128).any()
    with pytest.raises(RequestError, match=r"got 1 images of sizes \[\]"):
        contact_sheet([None], ["nothing at all"])


@pytest.mark.parametrize(
    ("headings", "message"),
    [
        ({"row_headings": ["one"]}, "got 1 headings for 2 rows"),
        ({"column_headings": ["one", "two", "three"]}, "got 3 headings for 2 columns"),
    ],
)
def test_every_row_and_column_needs_a_heading(headings: dict[str, list[str]], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        contact_sheet(
            make_images(4),
            [""] * 4,
            columns=2,
            row_headings=headings.get("row_headings", ()),
            column_headings=headings.get("column_headings", ()),
        )

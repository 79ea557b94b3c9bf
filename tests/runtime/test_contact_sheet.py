from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from latentrt.contact_sheet import contact_sheet
from latentrt.errors import RequestError


def pictures(count: int, size: tuple[int, int] = (8, 4)) -> list[Image.Image]:
    return [Image.new("RGB", size, (10 * index, 0, 0)) for index in range(count)]


def test_pictures_stand_in_rows() -> None:
    sheet = np.asarray(contact_sheet(pictures(5), [""] * 5, columns=3, edge=8))
    assert sheet.shape == (2 * (8 + 12) + 12, 3 * (16 + 12) + 12, 3)
    for index in range(5):
        y, x = 12 + index // 3 * 20, 12 + index % 3 * 28
        assert (sheet[y : y + 8, x : x + 16] == [10 * index, 0, 0]).all()
    assert (sheet[:12] == 255).all()
    assert (sheet[32:40, 68:84] == 255).all()  # the sixth place is empty


def test_captions_stand_below() -> None:
    plain = np.asarray(contact_sheet(pictures(1), [""], edge=8))
    said = np.asarray(contact_sheet(pictures(1, (64, 64)), ["a large red circle on a blue background"], edge=192))
    assert plain.shape[0] == 8 + 2 * 12
    below = said[12 + 192 :]
    assert (below < 128).any()
    assert (said[:, -12:] == 255).all()  # nothing sticks out


@pytest.mark.parametrize("caption", ["word " * 200, "x" * 80, "a " + "x" * 80, "ä" * 500])
def test_a_long_caption_is_cut(caption: str) -> None:
    """It stays in its own cell: below its picture, above the sheet's end, and beside the next."""
    sheet = np.asarray(contact_sheet(pictures(2, (64, 64)), [caption, ""], edge=64))
    assert (sheet[12 + 64 : -10, 12 : 12 + 64] < 128).any()
    assert (sheet[-10:] == 255).all()
    assert (sheet[12 + 64 :, 12 + 64 + 1 :] == 255).all()


def test_a_cut_caption_says_so() -> None:
    def below(caption: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return np.asarray(contact_sheet(pictures(1, (64, 64)), [caption], edge=64))

    # What is left out could have been anything: the same three lines, the last with "…".
    assert np.array_equal(below("words words words " + "more"), below("words words words " + "less"))
    assert not np.array_equal(below("words words words " + "more"), below("words words words"))


def test_large_pictures_keep_their_size() -> None:
    assert contact_sheet(pictures(1, (300, 200)), [""], edge=100).size == (324, 224)


@pytest.mark.parametrize(
    ("count", "captions", "columns", "message"),
    [
        (0, 0, 4, "found 0 pictures"),
        (2, 1, 4, "1 captions"),
        (1, 1, 0, "0 columns"),
    ],
)
def test_what_cannot_be_laid_out(count: int, captions: int, columns: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        contact_sheet(pictures(count), ["x"] * captions, columns=columns)


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(RequestError, match=r"sizes \[\(8, 4\), \(9, 4\)\]"):
        contact_sheet([*pictures(1), *pictures(1, (9, 4))], ["", ""])

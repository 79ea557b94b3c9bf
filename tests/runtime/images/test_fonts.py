"""Every script is readable or escaped; no character becomes an empty box."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from latentrt.images import fonts
from latentrt.images.contact_sheet import contact_sheet
from latentrt.images.fonts import system_fonts, typeset

SHIPPED = {
    "German": "ein größerer Kreis auf blauem Grund",
    "Polish": "duże czerwone koło",
    "Vietnamese": "một hình tròn đỏ lớn, Đường",
    "Greek": "κόκκινος κύκλος σε μπλε φόντο",
    "Cyrillic": "большой красный круг; великий червоний ґанок",
    "signs": "512 × 512, σ ± 1, “quoted” – 5 €…",
}
OTHERS = {
    "Arabic": "دائرة حمراء على خلفية زرقاء",
    "Hebrew": "עיגול אדום גדול",
    "Devanagari": "नीली पृष्ठभूमि पर लाल घेरा",
    "Chinese": "蓝色背景上的一个大红色圆圈和一个小绿色方块",
    "emoji": "😀🙂",
}
ARABIC, CHINESE = OTHERS["Arabic"], OTHERS["Chinese"]
SIZE = 13


@pytest.fixture(autouse=True)
def without_system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fonts, "system_fonts", tuple)
    fonts._best_face.cache_clear()
    yield
    fonts._best_face.cache_clear()


def escaped(text: str) -> str:
    return "".join(c if c.isascii() else c.encode("unicode_escape").decode() for c in text)


def test_plain_english_is_in_the_font_of_pillow() -> None:
    font, text = typeset("a large red circle on a blue background", SIZE)
    assert (font.getname()[0], text) == ("Aileron", "a large red circle on a blue background")


@pytest.mark.parametrize("text", SHIPPED.values(), ids=SHIPPED)
def test_latin_greek_and_cyrillic_are_in_the_font_that_ships(text: str) -> None:
    font, written = typeset(text, SIZE)
    assert (font.getname()[0], written) == ("Noto Sans", text)


@pytest.mark.parametrize("text", OTHERS.values(), ids=OTHERS)
def test_what_no_font_has_is_escaped(text: str) -> None:
    _, written = typeset(f"a {text} b", SIZE)
    assert written == f"a {escaped(text)} b"
    assert written.encode().decode("unicode_escape") == f"a {text} b"


@pytest.mark.parametrize("text", [*SHIPPED.values(), *OTHERS.values(), "mixed: ж ع 中 😀 a"])
def test_no_letter_is_drawn_as_the_box_of_a_missing_one(text: str) -> None:
    font, written = typeset(text, SIZE)
    (face,) = [face for face in fonts._faces(SIZE) if face.font.getname() == font.getname()]
    box = bytes(face.glyphs.getmask("\U0010ffff"))
    assert [c for c in written if not c.isspace() and bytes(face.glyphs.getmask(c)) == box] == []


def test_the_font_that_has_most_writes_a_mixed_text() -> None:
    font, written = typeset("красный 圆 circle", SIZE)
    assert (font.getname()[0], written) == ("Noto Sans", r"красный \u5706 circle")


def test_accents_of_their_own_are_composed() -> None:
    assert typeset("cafe\u0301", SIZE)[1] == "caf\u00e9"


def test_controls_and_reversed_lines_are_escaped() -> None:
    assert typeset("\x1b[31m \u202eabc", SIZE)[1] == r"\x1b[31m \u202eabc"


def test_joiners_are_left_out_of_a_font_that_has_no_use_for_them() -> None:
    assert typeset("a\u200db\ufe0f", SIZE)[1] == "ab"


@pytest.mark.extras
class TestWithSystemFont:
    """With a font of the system that has Arabic: that of matplotlib."""

    @pytest.fixture(autouse=True)
    def system_font(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        matplotlib = pytest.importorskip("matplotlib")
        damaged = tmp_path / "NotoSans-Regular.ttf"
        damaged.write_bytes(b"no font")
        found = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
        monkeypatch.setattr(fonts, "system_fonts", lambda: (damaged, found))

    def test_arabic_is_written_from_right_to_left_or_escaped(self) -> None:
        font, written = typeset(ARABIC, SIZE)
        if features.check("fribidi"):
            assert (font.getname()[0], written) == ("DejaVu Sans", ARABIC)
        else:
            assert written == escaped(ARABIC)

    def test_arabic_is_escaped_where_letters_cannot_be_joined(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("PIL.features.check", lambda _: False)
        assert typeset(ARABIC, SIZE)[1] == escaped(ARABIC)

    def test_emoji_are_written_if_the_font_has_them(self) -> None:
        font, written = typeset("a 😀", SIZE)
        assert (font.getname()[0], written) == ("DejaVu Sans", "a 😀")


def test_fonts_of_the_system_are_found_by_name_the_best_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["cjk/NotoSansCJK-Regular.ttc", "a/DejaVuSans.ttf", "a/NotoSans[wdth,wght].ttf", "NotoSansThai-Regular.ttf"]
    for name in (*names, "a/DejaVuSans-Bold.ttf", "NotoSans-Bold.ttf", "NotoColorEmoji.ttf", "NotoSans.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(fonts, "_FOLDERS", (str(tmp_path), str(tmp_path / "missing")))
    assert [path.relative_to(tmp_path).as_posix() for path in system_fonts.__wrapped__()] == [
        *(names[2], names[1], names[0], names[3])
    ]


@pytest.mark.parametrize("text", [CHINESE, ARABIC, "великий " * 9, SHIPPED["Greek"]])
def test_captions_of_any_script_are_wrapped(text: str) -> None:
    """They use their lines, also without spaces, and stay in their cell."""
    sheet = np.asarray(contact_sheet([Image.new("RGB", (64, 64))] * 2, [text, ""], columns=2, edge=64))
    lines = [sheet[12 + 64 + top : 12 + 64 + top + 17, 12 : 12 + 64] for top in (4, 21, 38)]
    assert all((line < 128).any() for line in lines)
    assert (sheet[12 + 64 :, 12 + 64 + 1 :] == 255).all()
    assert (sheet[-8:] == 255).all()


def test_a_font_whose_outlines_are_damaged_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It opens as any other, and fails at a letter."""
    data = bytearray(fonts._SUBSET.read_bytes())
    # The table of the outlines: tag, checksum, offset, length.
    entry = data.index(b"glyf")
    offset, length = (int.from_bytes(data[entry + place : entry + place + 4], "big") for place in (8, 12))
    data[offset : offset + length] = b"\xff" * length
    damaged = tmp_path / "NotoSans-Regular.ttf"
    damaged.write_bytes(data)
    monkeypatch.setattr(fonts, "system_fonts", lambda: (damaged,))
    assert fonts._open(damaged, SIZE) is not None
    assert contact_sheet([Image.new("RGB", (64, 64))], [CHINESE]).size
    assert typeset(CHINESE, SIZE)[1] == escaped(CHINESE)

from __future__ import annotations

import pytest

from latentrt.bundle.printable import did_you_mean, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, größer, 日本", "plain, größer, 日本"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("bell\x07 back\x08", r"bell\x07 back\x08"),
        ("two\nlines\ttab\r", r"two\nlines\ttab\r"),
        ("\x9b31m", r"\x9b31m"),
        ("abc\u202edef", r"abc\u202edef"),
        ("\ud800", r"\ud800"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("[bold]markup[/]", "[bold]markup[/]"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_a_newline_may_be_kept() -> None:
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_the_nearest_known_name_is_a_hint() -> None:
    assert did_you_mean("stpes", ["seed", "steps"]) == "; did you mean steps?"
    assert did_you_mean("x", ["seed", "steps"]) == ""

from __future__ import annotations

import string
from datetime import date
from pathlib import Path, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.batch.names import FIELDS, MAX_VALUE_BYTES, NameTemplate, safe_value
from latentrt.errors import RequestError

VALUES: dict[str, Any] = {
    "index": 4,
    "seed": 7,
    "prompt": "a red circle, 50% blue",
    "sampler": "dpmpp_2m",
    "steps": 25,
    "guidance_scale": 7.5,
    "width": 512,
    "height": 768,
    "date": date(2026, 1, 31),
}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("out.png", "out.png"),
        ("{index:04}.png", "0004.png"),
        ("{sampler}/{seed:08d}-{prompt}.png", "dpmpp_2m/00000007-a-red-circle,-50%-blue.png"),
        ("{prompt:.5}.webp", "a-red.webp"),
        ("{date}/{steps}x{guidance_scale:.2f}.jpg", "2026-01-31/25x7.50.jpg"),
        ("{date:%Y/%m}.png", "2026_01.png"),
        ("{width}x{height}/{index}", "512x768/4"),
        ("{{{index}}}.png", "{4}.png"),
        ("../{index}.png", "../4.png"),
    ],
)
def test_fields_are_filled(template: str, name: str) -> None:
    assert NameTemplate(template).fill(VALUES) == Path(name)


def test_every_field_has_a_value_here() -> None:
    assert VALUES.keys() == FIELDS.keys()
    assert NameTemplate("".join(f"{{{name}}}" for name in FIELDS)).fields == set(FIELDS)


@pytest.mark.parametrize(
    ("template", "extension"),
    [("a.png", ".png"), ("{seed}.png", ".png"), ("{prompt}", ""), ("a.b/{seed}", ""), ("{{a}}.PNG", ".PNG"), ("a", "")],
)
def test_the_extension_is_the_template_s(template: str, extension: str) -> None:
    assert NameTemplate(template).extension == extension


@pytest.mark.parametrize(
    "template",
    [
        *("{x}", "{}", "{0}", "{prompt.x}", "{prompt[0]}", "{seed!r}", "{", "}", "{seed", "{seed:q}", "{seed:{index}}"),
        *(
            "{index:0999}",
            "{index:999999999}",
            "{index:٩٩٩٩٩٩٩٩٩٩}",
            "{prompt:0９９９９９９}",
            "{prompt:.999999}",
            "{seed:c}",
            "{prompt:d}",
            "{sampler:04}x{",
            "{Seed}",
        ),
    ],
)
def test_another_field_or_format_is_refused(template: str) -> None:
    with pytest.raises(RequestError, match=r"`output`: got .*\{index\}, \{seed\}, \{prompt\}"):
        NameTemplate(template)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("..", "_.png"),
        (".", "_.png"),
        ("", "_.png"),
        ("   ", "_.png"),
        ("../../etc/passwd", "_.._etc_passwd.png"),
        ('a\\b:c*d?e"f<g>h|i', "a_b_c_d_e_f_g_h_i.png"),
        ("a\nb\tc", "a-b-c.png"),
        ("a\0b\x1bc\x7fd\u202ee", "a_b_c_d_e.png"),
        (".hidden", "hidden.png"),
        ("ends. . .", "ends.-.-.png"),
        ("CON", "CON_.png"),
        ("nul", "nul_.png"),
        ("com¹", "com¹_.png"),
        ("aux.b", "aux_.b.png"),
        ("e\u0301", "é.png"),
        ("x" * 1000, "x" * MAX_VALUE_BYTES + ".png"),
        ("é" * 1000, "é" * (MAX_VALUE_BYTES // 2) + ".png"),
        ("\ud800", "_.png"),
    ],
)
def test_a_value_is_safe_in_a_name(prompt: str, name: str) -> None:
    assert NameTemplate("{prompt}.png").fill({**VALUES, "prompt": prompt}) == Path(name)


RESERVED = {"con", "prn", "aux", "nul", "com1", "lpt9"}


@given(st.text() | st.sampled_from([*sorted(RESERVED), ".", "..", "/", "a/..", "C:x"]))
def test_any_prompt_gives_one_component_that_every_system_accepts(prompt: str) -> None:
    place = NameTemplate("folder/{prompt}/{prompt}.png").fill({**VALUES, "prompt": prompt})
    folder, own, name = place.parts
    assert folder == "folder"
    for part in (own, name):
        assert PureWindowsPath(part).parts == (part,), "no separator and no drive"
        assert part.isprintable()
        assert len(part.encode()) <= 255
        assert part not in (".", "..")
        assert not part.startswith(".")
        assert not part.endswith((".", " "))
        assert not set(part) & set('<>:"/\\|?*')
        assert part.split(".")[0].rstrip().lower() not in RESERVED


@given(st.text())
def test_a_safe_value_is_safe_again(text: str) -> None:
    assert safe_value(safe_value(text)) == safe_value(text)


@given(st.lists(st.sampled_from([*"{}:!.[]0d/", *FIELDS]), max_size=12))
def test_a_template_is_refused_or_can_be_filled(parts: list[str]) -> None:
    text = "".join(parts)
    try:
        template = NameTemplate(text)
    except RequestError:
        return
    assert template.fields <= FIELDS.keys()
    name = template.fill(VALUES)
    assert len(name.as_posix()) < 12 * (MAX_VALUE_BYTES + 1)
    assert isinstance(template.extension, str)


@given(st.integers(0, 2**63 - 1), st.sampled_from(["", "04", "020d", "x", ",", "_", ">9"]))
def test_numbers_keep_their_digits(seed: int, spec: str) -> None:
    name = NameTemplate(f"{{seed:{spec}}}").fill({**VALUES, "seed": seed}).name
    kept = string.hexdigits if spec == "x" else string.digits
    base = 16 if spec == "x" else 10
    assert int("".join(each for each in name if each in kept), base) == seed

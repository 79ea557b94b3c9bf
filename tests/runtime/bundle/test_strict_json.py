"""Strict JSON: one meaning, and bounds on size, nesting, number of values and time."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import pytest

from latentrt.bundle.strict_json import MAX_DEPTH, AmbiguousJSONError, StrictDecoder, parse_json


class Size(msgspec.Struct, forbid_unknown_fields=True):
    side: int
    name: str = ""


SIZE = StrictDecoder(Size, max_bytes=1000)


def refusal(data: bytes, **bounds: int) -> str:
    with pytest.raises(AmbiguousJSONError) as caught:
        parse_json(data, **bounds)  # type: ignore[arg-type]
    return str(caught.value)


def nested(depth: int, value: bytes = b"") -> bytes:
    return b"[" * depth + value + b"]" * depth


def test_the_deepest_nesting() -> None:
    assert parse_json(nested(MAX_DEPTH)) is not None
    assert f"deeper than {MAX_DEPTH} levels" in refusal(nested(MAX_DEPTH + 1))
    assert parse_json(b'{"a": [1]}', max_depth=2) == {"a": [1]}
    assert "deeper than 2" in refusal(b'{"a": [{}]}', max_depth=2)


def test_brackets_in_strings_do_not_nest() -> None:
    text = "[" * 100 + '\\"' + "{" * 100
    for escaped in (text, text + "\\\\", "\\\\" + text, '\\\\\\"' + text):
        assert parse_json(f'["{escaped}", "{escaped}"]'.encode()) is not None
        assert "deeper" in refusal(f'["{escaped}", {"[" * 40}'.encode())
    assert "not JSON" in refusal(b'["[[[[')


def test_the_largest_text_and_the_largest_number_of_values() -> None:
    assert parse_json(b"[1,2]", max_bytes=5) == [1, 2]
    assert "larger than 4 bytes" in refusal(b"[1,2]", max_bytes=4)
    assert parse_json(b'[1,"2,3,4",{}]', max_values=4) == [1, "2,3,4", {}]
    assert "more than 3 values" in refusal(b"[1,2,[],{}]", max_values=3)
    # Refused before anything is built: 100 bytes of memory for each of 5 million lists.
    assert "values" in refusal(b"[" + b"[]," * 5_000_000 + b"1]")


def test_half_a_surrogate_pair() -> None:
    assert parse_json(b'["\\ud83d\\ude00"]') == ["😀"]
    assert "half a surrogate pair" in refusal(b'{"a": ["\\ud83d"]}')
    assert "half a surrogate pair" in refusal(b'{"\\uDE00": 1}')
    assert parse_json(b'["\\ud83d"]', half_surrogates=True) == ["\ud83d"]


def test_a_decoder_checks_the_text_and_the_type() -> None:
    assert SIZE.decode(b'{"side": 8}') == Size(8)
    assert SIZE.convert({"side": 8, "name": "a"}) == Size(8, "a")
    for text in (b"", b"{", b"[]", b'{"side": "8"}', b'{"side": 8, "more": 1}', b'{"side": 8, "side": 8}'):
        with pytest.raises(AmbiguousJSONError):
            SIZE.decode(text)
    with pytest.raises(AmbiguousJSONError, match="larger than 1,000 bytes"):
        SIZE.decode(b'{"side": 8}' + b" " * 1000)


def test_a_decoder_has_the_limits_of_its_caller() -> None:
    halves = StrictDecoder(Size, half_surrogates=True)
    assert halves.decode(b'{"side": 8, "name": "\\ud83d"}').name == "\ud83d"
    with pytest.raises(AmbiguousJSONError, match="half a surrogate pair"):
        SIZE.decode(b'{"side": 8, "name": "\\ud83d"}')


def test_an_unknown_key_is_abbreviated_and_escaped() -> None:
    with pytest.raises(AmbiguousJSONError) as caught:
        SIZE.convert({"side": 8, "\x1b[2J" + "a" * 10_000: 1})
    assert len(str(caught.value)) < 400
    assert "\x1b" not in str(caught.value)


def test_a_long_key_is_abbreviated() -> None:
    assert len(refusal(b'{"%s": 1, "%s": 2}' % (b"a" * 10_000, b"a" * 10_000))) < 200


def compare_times(make: Callable[[int], bytes], count: int) -> float:
    """Return how many times longer sixteen times the work takes, at best of five."""

    def seconds(data: bytes) -> float:
        began = time.process_time()
        refusal(data)
        return time.process_time() - began

    few, many = make(count), make(16 * count)
    return min(seconds(many) for _ in range(5)) / max(min(seconds(few) for _ in range(5)), 1e-4)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda count: b"{" + b'"a":1,' * count + b'"a":1}', id="one key"),
        pytest.param(
            lambda count: b"{%s}" % b",".join(b'"k%d":1' % min(key, count - 2) for key in range(count)), id="at the end"
        ),
    ],
)
def test_duplicate_keys_take_linear_time(make: Callable[[int], bytes]) -> None:
    """Quadratic time would be 256 times as long; a busy machine measures a linear one up to twice too long."""
    assert compare_times(make, 2_000) < 64

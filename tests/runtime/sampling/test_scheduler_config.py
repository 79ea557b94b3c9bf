from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from latentrt.errors import RequestError
from latentrt.sampling.scheduler_config import MAX_CONFIG_BYTES, read_scheduler_config


def write(place: Path, text: str | bytes) -> Path:
    place.write_bytes(text.encode() if isinstance(text, str) else text)
    return place


def test_what_the_file_says(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "trained_betas": [0.1, 2e-3],
        "clip_sample": False,
        "é": None,
    }
    assert read_scheduler_config(write(tmp_path / "config.json", json.dumps(config))) == config


def test_an_infinite_default_as_diffusers_writes_it(tmp_path: Path) -> None:
    config = read_scheduler_config(write(tmp_path / "config.json", '{"low": -Infinity, "high": Infinity}'))
    assert config == {"low": -math.inf, "high": math.inf}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b"[1, 2]", "holds a list, expected a JSON object"),
        (b"null", "holds a NoneType"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "has the key 'c' twice"),
        (b'{"a": NaN}', "has the number NaN"),
        (b'{"a": 1e999}', "has the number 1e999"),
        (b'{"a": 9223372036854775808}', "has the number 9223372036854775808"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "has the number 9999"),
        (b'{"a": "\xff"}', "is not UTF-8 (byte 7)"),
        (b'{"a": ' + b"[" * 200_000, "is nested deeper"),
        (b" " * (MAX_CONFIG_BYTES + 1), "is larger than 1,048,576 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(tmp_path: Path, text: bytes, words: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_scheduler_config(write(tmp_path / "config.json", text))
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)
    assert str(caught.value).endswith("give a scheduler_config.json as diffusers saves it")
    assert len(str(caught.value)) < 500


def test_the_longest_that_is_read(tmp_path: Path) -> None:
    text = '{"a": 1}'.ljust(MAX_CONFIG_BYTES)
    assert read_scheduler_config(write(tmp_path / "config.json", text)) == {"a": 1}


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"missing\.json cannot be read: No such file"):
        read_scheduler_config(tmp_path / "missing.json")
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_scheduler_config(tmp_path)


def test_a_name_cannot_talk_to_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        read_scheduler_config(tmp_path / "\x1b[2J.json")
    assert str(caught.value).isprintable()

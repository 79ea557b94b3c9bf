"""The options of quantisation on the command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from latentrt.errors import RequestError
from latentrt_export.quantize.options import QuantizationOptions, read_options


def test_defaults(tmp_path: Path) -> None:
    assert read_options(None, None, None) is None
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a blue square \n")
    found = read_options("static", prompts, None)
    assert found == QuantizationOptions(prompts=("a red circle", "a blue square"))
    assert read_options("weights", None, None) == QuantizationOptions(method="weights")


def test_options_without_effect_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="`calibration_prompts` with `quantization='weights'`"):
        read_options("weights", tmp_path / "prompts.txt", None)
    with pytest.raises(RequestError, match="`calibration_steps` with `quantization='weights'`"):
        read_options("weights", None, 4)


@pytest.mark.parametrize(
    ("text", "steps", "message"),
    [
        ("\n \n", None, "got no prompt"),
        (None, None, "cannot be read"),
        ("a", 0, "`calibration_steps` 0, expected 1 to"),
    ],
)
def test_invalid_options(tmp_path: Path, text: str | None, steps: int | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_options(None, file, steps)


def test_a_pipe_and_a_huge_file_of_prompts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 10 << 30)
    for name, message in (("pipe", "not a regular file"), ("huge", "more than 1,048,576 bytes")):
        with pytest.raises(RequestError, match=message):
            read_options(None, tmp_path / name, None)

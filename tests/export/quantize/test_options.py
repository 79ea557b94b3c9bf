"""The options of quantisation on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from latentrt.errors import RequestError
from latentrt_export.quantize.options import QuantizationOptions, read_options


def test_options_that_are_left_out_are_the_defaults(tmp_path: Path) -> None:
    assert read_options(None, None, None, 7.5) is None
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n  a blue square \n")
    found = read_options("static", prompts, None, 5.0)
    assert found == QuantizationOptions(prompts=("a red circle", "a blue square"), guidance_scale=5.0)
    assert read_options("weights", None, None, 5.0) == QuantizationOptions(method="weights", guidance_scale=5.0)


def test_options_that_would_be_ignored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="found --calibration-prompts with --quantization weights, which calibrates"):
        read_options("weights", tmp_path / "prompts.txt", None, 5.0)
    with pytest.raises(RequestError, match="found --calibration-steps with --quantization weights"):
        read_options("weights", None, 4, 5.0)


@pytest.mark.parametrize(
    ("text", "steps", "words"),
    [("\n \n", None, "found no prompt in"), (None, None, "cannot be read"), ("a", 0, "found 0 steps to calibrate in")],
)
def test_options_that_are_impossible(tmp_path: Path, text: str | None, steps: int | None, words: str) -> None:
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RequestError, match=words):
        read_options(None, file, steps, 7.5)

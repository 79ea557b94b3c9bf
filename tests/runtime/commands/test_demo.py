from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentrt import Pipeline
from latentrt.cli import main
from latentrt.sample import PROMPTS, bundle_path


def run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *map(str, args)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_a_dozen_prompts_on_one_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "sheet.png"
    assert run("-o", place, "--steps", "2") == 0
    out = capsys.readouterr().out
    assert f"{place}: 12 pictures in " in out
    assert f'latentrt run {bundle_path()} "{PROMPTS[0]}"' in out
    with Image.open(place) as sheet:
        assert sheet.size == (4 * (192 + 12) + 12, 3 * (192 + 12 + 51) + 12)


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    """Without an output it is demo.png; the picture is the one that the pipeline draws, three times as large."""
    place = tmp_path / "one.png"
    assert run("a red circle on a blue background", "-o", place, "--seed", "3", "--steps", "4", "--quiet") == 0
    image = Pipeline.load()(
        "a red circle on a blue background", seed=3, num_inference_steps=4, guidance_scale=5.0
    ).images[0]
    with Image.open(place) as sheet:
        drawn = np.asarray(sheet)[12 : 12 + 192 : 3, 12 : 12 + 192 : 3]
    assert np.array_equal(drawn, np.asarray(image))


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-o", tmp_path / "missing" / "sheet.png") == 8
    assert "missing" in capsys.readouterr().err


def test_an_impossible_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--steps", "0", "-o", tmp_path / "sheet.png") == 2
    assert not (tmp_path / "sheet.png").exists()
    assert "steps" in capsys.readouterr().err


def test_the_prompts_are_a_dozen() -> None:
    assert len(set(PROMPTS)) == 12

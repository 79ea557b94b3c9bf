from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt import Pipeline
from latentrt.bundle.sample import bundle_path
from latentrt.cli.demo import PROMPTS
from latentrt.cli.main import main
from sample.judge import agrees, read
from sample.scenes import Scene, Thing

ROOT = Path(__file__).parents[3]


def run(*args: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["demo", *map(str, args)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


# What PROMPTS say.
SCENES = (
    Scene((Thing("circle", "red", "large"),), "blue"),
    Scene((Thing("star", "yellow", "small"),), "black"),
    Scene((Thing("heart", "green", "large"),), "white"),
    Scene((Thing("triangle", "purple"),), "yellow"),
    Scene((Thing("cross", "white"),), "red"),
    Scene((Thing("square", "orange"),), "green", "left"),
    Scene((Thing("circle", "black", "small"),), "orange", "top"),
    Scene((Thing("star", "green"), Thing("square", "blue")), None, None, "left of"),
    Scene((Thing("heart", "red", "large"), Thing("circle", "white", "small")), "black", None, "above"),
    Scene((Thing("square", "purple"), Thing("triangle", "yellow")), "white", None, "above"),
    Scene((Thing("cross", "orange"), Thing("star", "white")), "purple", None, "left of"),
    Scene((Thing("circle", "blue", "small"), Thing("heart", "black", "large")), "yellow", None, "left of"),
)
CELL = (192 + 12, 192 + 12 + 51)  # a picture, the margin, the caption


def pictures_of(sheet: Path, count: int) -> list[NDArray[np.uint8]]:
    """What a sheet of four columns shows, at the size that it was drawn in."""
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened)
    corners = [(12 + index % 4 * CELL[0], 12 + index // 4 * CELL[1]) for index in range(count)]
    return [pixels[y : y + 192 : 3, x : x + 192 : 3] for x, y in corners]


@pytest.fixture(scope="module")
def dozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dozen") / "sheet.png"
    assert run("-o", place) == 0
    return place


def test_a_dozen_prompts_on_one_sheet(dozen: Path) -> None:
    """Drawn as the command draws them when it is told nothing, and read by the judge."""
    with Image.open(dozen) as sheet:
        assert sheet.size == (4 * CELL[0] + 12, 3 * CELL[1] + 12)
    right = [agrees(scene, read(picture)) for scene, picture in zip(SCENES, pictures_of(dozen, 12), strict=True)]
    assert sum(right) >= 11, [prompt for prompt, is_right in zip(PROMPTS, right, strict=True) if not is_right]


def test_the_sheet_in_the_readme_is_what_the_command_draws(dozen: Path) -> None:
    """Within 2 of 255 levels: another machine's kernels round otherwise."""
    with Image.open(ROOT / "docs" / "demo.png") as shown, Image.open(dozen) as drawn:
        difference = np.abs(np.asarray(shown).astype(int) - np.asarray(drawn))
    assert difference.max() <= 2
    assert "latentrt demo -o docs/demo.png" in (ROOT / "README.md").read_text()


def test_the_command_that_draws_one_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed last, given to a shell, draws the first picture, with everything that was asked for."""
    monkeypatch.chdir(tmp_path)
    prompt = 'a "red" circle on a $HOME blue background'
    asked = ("--seed", "3", "--steps", "4", "--sampler", "euler", "--guidance-scale", "3", "-n", "a star")
    assert run(prompt, *asked) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    again = shlex.split(line.removeprefix("the first alone: latentrt "))
    assert again[:3] == ["run", str(bundle_path()), prompt]
    with pytest.raises(SystemExit) as caught:
        main(again)
    assert caught.value.code == 0
    with Image.open(tmp_path / "picture.png") as alone:
        assert np.array_equal(pictures_of(tmp_path / "demo.png", 1)[0], np.asarray(alone))


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    """The picture is the one that the pipeline draws, three times as large."""
    place = tmp_path / "one.png"
    assert run("a red circle on a blue background", "-o", place, "--seed", "3", "--steps", "4", "--quiet") == 0
    image = Pipeline.load()("a red circle on a blue background", seed=3, num_inference_steps=4).images[0]
    assert np.array_equal(pictures_of(place, 1)[0], np.asarray(image))


def test_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("-o", tmp_path / "missing" / "sheet.png") == 8
    assert "missing" in capsys.readouterr().err


def test_an_impossible_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--steps", "0", "-o", tmp_path / "sheet.png") == 2
    assert not (tmp_path / "sheet.png").exists()
    assert "steps" in capsys.readouterr().err


def test_the_prompts_are_a_dozen() -> None:
    assert len(set(PROMPTS)) == 12

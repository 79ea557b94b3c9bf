from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt import Pipeline
from latentrt.cli.demo import PROMPTS
from latentrt.cli.main import main
from sample.scenes import Scene, Thing
from tests.runtime.cli.conftest import Caller

ROOT = Path(__file__).parents[3]
# The scenes that PROMPTS describe.
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
CELL = (192 + 12, 192 + 12 + 51)  # an image, the margin, the caption


def images_of(sheet: Path, count: int) -> list[NDArray[np.uint8]]:
    """Return the images of a sheet of four columns, at the size that they were generated in."""
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened)
    corners = [(12 + index % 4 * CELL[0], 12 + index // 4 * CELL[1]) for index in range(count)]
    return [pixels[y : y + 192 : 3, x : x + 192 : 3] for x, y in corners]


@pytest.fixture(scope="module")
def dozen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sheet that the command writes without prompts."""
    place = tmp_path_factory.mktemp("dozen") / "sheet.png"
    with pytest.raises(SystemExit) as end:
        main(["demo", "-o", str(place), "--quiet"])
    assert end.value.code == 0
    return place


@pytest.mark.extras
def test_a_dozen_prompts_on_one_sheet(dozen: Path) -> None:
    """The classical judge, which needs SciPy, finds the prompts' scenes in the images."""
    from sample.judge import agrees, read

    with Image.open(dozen) as sheet:
        assert sheet.size == (4 * CELL[0] + 12, 3 * CELL[1] + 12)
    right = [agrees(scene, read(image)) for scene, image in zip(SCENES, images_of(dozen, 12), strict=True)]
    assert sum(right) >= 11, [prompt for prompt, is_right in zip(PROMPTS, right, strict=True) if not is_right]


def test_the_sheet_in_the_readme_is_the_command_s(dozen: Path) -> None:
    """Within 2 of 255 levels: another machine's kernels round otherwise."""
    with Image.open(ROOT / "docs" / "demo.png") as shown, Image.open(dozen) as made:
        difference = np.abs(np.asarray(shown).astype(int) - np.asarray(made))
    assert difference.max() <= 2
    assert "latentrt demo -o demo.png" in (ROOT / "README.md").read_text()


def test_the_printed_command_generates_the_first_image_again(
    latentrt: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every option of the call, in a shell's quoting."""
    monkeypatch.chdir(tmp_path)
    prompt = 'a "red" circle on a $HOME blue background'
    options = ("--seed", "3", "--steps", "4", "--sampler", "euler", "--guidance-scale", "3", "-n", "a star")
    done = latentrt("demo", prompt, *options)
    assert done.code == 0, done.err
    assert done.out.startswith("demo.png: 1 image in ")
    again = shlex.split(done.out.splitlines()[-1].removeprefix("the first alone: latentrt "))
    assert again[:3] == ["run", "sample", prompt]
    assert latentrt(*again).code == 0
    with Image.open(tmp_path / "image.png") as alone:
        assert np.array_equal(images_of(tmp_path / "demo.png", 1)[0], np.asarray(alone))


def test_prompts_of_one_s_own(latentrt: Caller, tmp_path: Path) -> None:
    """An image is the one that the pipeline generates, three times as large."""
    place, prompts = tmp_path / "two.png", ("a red circle on a blue background", "a green star")
    done = latentrt("demo", *prompts, "-o", place, "--seed", "3", "--steps", "4", "--quiet")
    assert (done.code, done.out) == (0, "")
    result = Pipeline.load()(prompts, seed=3, num_inference_steps=4)
    for shown, image in zip(images_of(place, 2), result.images, strict=True):
        assert np.array_equal(shown, np.asarray(image))


def test_a_place_that_cannot_be_written(latentrt: Caller, tmp_path: Path) -> None:
    done = latentrt("demo", "-o", tmp_path / "missing" / "sheet.png")
    assert done.code == 8
    assert "missing" in done.err


def test_an_impossible_request(latentrt: Caller, tmp_path: Path) -> None:
    done = latentrt("demo", "--steps", "0", "-o", tmp_path / "sheet.png")
    assert done.code == 2
    assert "--steps: got 0" in done.err
    assert not (tmp_path / "sheet.png").exists()


def test_the_prompts_are_a_dozen() -> None:
    assert len(set(PROMPTS)) == len(SCENES) == 12

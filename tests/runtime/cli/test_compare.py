"""`latentrt compare`: the sample bundle, and another one, on this machine's CPU."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt import Pipeline
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.cli.comparison import default_samplers
from latentrt.cli.main import main
from tests.runtime import small_bundle

if TYPE_CHECKING:
    from tests.exported import Exported

CELL = (192 + 12, 192 + 12 + 51)  # an image, the margin, the caption
PROMPT = "a large red heart above a small white circle on a black background"


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, arguments)])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def read_images(sheet: Path, columns: int, rows: int) -> list[list[NDArray[np.uint8]]]:
    """Read the images of a contact sheet, row by row, in the size that they were generated in."""
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened)
    left, top = pixels.shape[1] - columns * CELL[0], pixels.shape[0] - rows * CELL[1]
    corners = [[(left + column * CELL[0], top + row * CELL[1]) for column in range(columns)] for row in range(rows)]
    return [[pixels[y : y + 192 : 3, x : x + 192 : 3] for x, y in row] for row in corners]


def test_a_sheet_a_table_and_the_same_values_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet, other = tmp_path / "sheet.png", tmp_path / "other.png"
    names = ("euler", "DPM++ 2M Karras", "pndm", "heun")
    arguments = ("--samplers", ",".join(names), "--steps", "3,4", "--seed", "5", "--runs", "3")
    assert run(*arguments, "-o", sheet, "--threads", "1") == 0
    printed = capsys.readouterr().out.splitlines()
    assert run("sample", *arguments, "-o", other, "--threads", "1", "--json") == 0
    found = json.loads(capsys.readouterr().out)

    pipeline = Pipeline.load(threads=1)
    rows = read_images(sheet, 2, 4)
    for name, row in zip(names, rows, strict=True):
        for steps, image in zip((3, 4), row, strict=True):
            if (name, steps) == ("pndm", 3):
                assert (image == 0xEE).all()
                continue
            generated = pipeline(PROMPT, seed=5, num_inference_steps=steps, sampler=name).images[0]
            assert np.array_equal(image, np.asarray(generated)), (name, steps)

    assert (found["sheet"], found["request"]["prompt"]) == (str(other), PROMPT)
    assert (found["request"]["seed"], found["request"]["guidance_scale"], found["threads"]) == (5, 5.0, 1)
    assert found["digest"] == Bundle.open(bundle_path()).digest
    backend = "OpenVINO" if find_spec("openvino") else "ONNX Runtime"
    assert found["runs_on"]["unet"].startswith(f"{backend} on the CPU")
    cells = {(cell["sampler"], cell["steps"]): cell for cell in found["cells"]}
    assert list(cells) == [(name, steps) for name in names for steps in (3, 4)]
    assert "needs at least 4" in cells["pndm", 3]["refused"]
    assert "got 3 steps (--steps)" in cells["pndm", 3]["refused"], "as the command line spells it"
    assert cells["heun", 4]["evaluations"] == 7
    for cell in found["cells"]:
        if "refused" not in cell:
            assert len(cell["runs_seconds"]) == 3
            assert sorted(cell["runs_seconds"])[1] == cell["seconds"] > 0

    assert re.fullmatch(r"sampler +3 steps +4 steps", printed[0])
    assert re.fullmatch(r"pndm +refused +(\d+ ms|[\d.]+ s), 13 evaluations", printed[3])
    assert re.fullmatch(r"heun +(\d+ ms|[\d.]+ s), 5 evaluations +(\d+ ms|[\d.]+ s), 7 evaluations", printed[4])
    assert printed[5] == f"refused: pndm in 3 steps: {cells['pndm', 3]['refused']}"
    assert printed[6] == f"{sheet}: {PROMPT!r}, seed 5"


@pytest.mark.extras
def test_another_bundle_and_nothing_printed(
    sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own scheduler, PNDM, comes first."""
    monkeypatch.chdir(tmp_path)
    size = ("--height", "64", "--width", "96", "--guidance-scale", "1", "-n", "a star", "--safety", "report")
    assert run(sd1.bundle, "a dog", "--steps", "4", *size, "--json", "--quiet") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["request"] == {
        "prompt": "a dog",
        "negative_prompt": "a star",
        "seed": 7,
        "guidance_scale": 1.0,
        "width": 96,
        "height": 64,
        "safety": "report",
    }
    model = Bundle.open(sd1.bundle).manifest.schedulers["unet"].class_name
    assert [cell["sampler"] for cell in found["cells"]] == default_samplers(model)
    with Image.open("compare.png") as sheet:
        assert sheet.height == 12 + 17 + len(found["cells"]) * (192 + 12 + 51)


def test_all_is_every_sampler_that_suits_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--samplers", "all", "--steps", "4", "-o", tmp_path / "sheet.webp", "--json")
    assert run(*arguments) == 0
    names = [cell["sampler"] for cell in json.loads(capsys.readouterr().out)["cells"] if "refused" not in cell]
    assert {"ddim", "ddpm", "pndm", "lms", "deis", "sa_solver"} <= set(names)
    assert not {"lcm", "ddim_inverse", "unclip", "flow_euler", "repaint"} & set(names)


def test_a_warning_is_logged_once_for_all_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = (
        "--samplers",
        "euler,ddim",
        "--steps",
        "1,2",
        "--safety",
        "off",
        "-o",
        tmp_path / "a.png",
    )
    assert run(*arguments, "--quiet") == 0
    assert [record.getMessage() for record in caplog.records].count(
        "the safety check is switched off; the images' metadata says so"
    ) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--samplers", "euler,eular"), 2, "--samplers: got 'eular'"),
        (("--samplers", "flow_euler"), 2, "flow_euler for flow models"),
        (
            ("--samplers", "flow_euler,pndm", "--steps", "3"),
            2,
            "every combination is refused:",
        ),
        (("--samplers", "euler,,ddim"), 2, "got 'euler,,ddim', expected NAME,NAME,…"),
        (("--steps", "5,0"), 2, "--steps: got '0', expected a whole number of at least 1"),
        (("--steps", "5,x"), 2, "--steps: got 'x', expected a whole number of at least 1"),
        (("--steps", "5000"), 2, "--steps: got 5000, expected a whole number from 1 to 1000"),
        (("--height", "66"), 2, "--height: got 66, expected a multiple of 4"),
        (("--digest", "sha256:" + "0" * 64), 4, "sha256:" + "0" * 64),
        (("--device", "toaster"), 2, "--device: got 'toaster'"),
        (("-o", "missing/sheet.png"), 8, "missing/sheet.png cannot be written"),
        (("-o", "sheet.gif"), 8, "expected one of .png"),
    ],
)
def test_arguments_that_are_refused_before_the_work(
    arguments: tuple[str, ...],
    code: int,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("compare.png").write_text("an earlier one")
    assert run(*arguments) == code
    assert says in capsys.readouterr().err
    assert Path("compare.png").read_text() == "an earlier one"
    assert list(tmp_path.iterdir()) == [tmp_path / "compare.png"]


def test_a_folder_that_is_not_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "-o", tmp_path / "sheet.png") == 4
    assert "bundle.json" in capsys.readouterr().err


@pytest.mark.extras
def test_a_bundle_without_a_classifier_requires_safety_off(
    sd1: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for place in sd1.bundle.iterdir():
        if place.name != "bundle.json":
            (bundle / place.name).symlink_to(place)
    (bundle / "bundle.json").write_bytes((sd1.bundle / "bundle.json").read_bytes())
    small_bundle.edit_manifest(bundle, lambda tree: tree["components"].pop("safety_checker"))
    assert run(bundle, "-o", tmp_path / "sheet.png") == 6
    assert "--safety off" in capsys.readouterr().err


def test_help_names_the_default_samplers(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    names = default_samplers("DDIMScheduler")
    assert f"of {', '.join(names[:-1])} and {names[-1]} those that suit it" in printed

"""Options of Stable Diffusion XL on the command line: sizes, places, and a refiner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt import Pipeline
from latentrt.cli.request_options import LoadOptions
from latentrt.images.metadata import read_metadata
from latentrt.refinement import RefinedPipeline
from tests.runtime.cli.conftest import Caller
from tests.runtime.fake_xl import SIZES, XL


def test_the_command_takes_a_bundle_for_each(latentrt: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, refiner = XL(), XL(refiner=True, tasks=("image-to-image", "inpainting"))
    refined = RefinedPipeline(base.pipeline, refiner.pipeline)
    loaded: list[tuple[str, str | None]] = []

    def load(options: LoadOptions, bundle: Path | None) -> Pipeline:
        loaded.append((str(bundle), options.digest))
        return (base if len(loaded) == 1 else refiner).pipeline

    monkeypatch.setattr(LoadOptions, "load", load)
    (tmp_path / "other").mkdir()
    shares = ("--denoising-end", "0.6", "--aesthetic-score", "8", "--original-size", "640x480")
    crop = ("--crops-coords-top-left", "16,8")
    size = ("--size", "96x64", "--steps", "10", "--seed", "3", "--safety", "off")
    out = tmp_path / "out.png"
    call = ("sample", "a star", "--refiner", tmp_path / "other", *shares, *crop, *size, "-o", out)
    done = latentrt("run", *call, "--digest", f"sha256:{'0' * 64}")
    assert done.code == 0, done.err
    assert loaded[1] == (str(tmp_path / "other"), None), "the digest is the base's"
    record = read_metadata(out).record
    assert record is not None
    assert record.options["denoising_start"] == 0.6
    assert record.options["original_size"] == [480, 640]
    assert record.options["crops_coords_top_left"] == [16, 8]
    options: dict[str, Any] = {
        "denoising_end": 0.6,
        "aesthetic_score": 8,
        "original_size": (480, 640),
        "crops_coords_top_left": (16, 8),
    }
    expected = refined(prompt="a star", **SIZES, num_inference_steps=10, seed=3, safety="off", **options)
    with Image.open(out) as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected.images[0]))


@pytest.fixture
def xl(monkeypatch: pytest.MonkeyPatch) -> XL:
    """The bundle of every command."""
    made = XL()
    monkeypatch.setattr(LoadOptions, "load", lambda options, bundle: made.pipeline)
    return made


QUICK = ("--size", "96x64", "--steps", "1", "--seed", "3", "--safety", "off", "--guidance-scale", "1")


def test_sizes_are_written_width_first_and_places_top_first(
    latentrt: Caller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xl: XL
) -> None:
    """On the command line, in an environment variable and in the configuration file; a line of JSON is as Python."""
    call = ("run", "sample", "a star", *QUICK, "--overwrite", "-o", tmp_path / "out.png")
    assert latentrt(*call, "--original-size", "640x480", "--crops-coords-top-left", "16,8").code == 0
    assert latentrt(*call, "--target-size", "512").code == 0
    monkeypatch.setenv("LATENTRT_RUN_ORIGINAL_SIZE", "640x480")
    assert latentrt(*call).code == 0
    monkeypatch.delenv("LATENTRT_RUN_ORIGINAL_SIZE")
    monkeypatch.setenv("LATENTRT_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text('[run]\noriginal-size = "640x480"\ncrops-coords-top-left = "16,8"\n')
    assert latentrt(*call).code == 0
    assert latentrt("config").code == 0
    monkeypatch.delenv("LATENTRT_CONFIG")
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"prompt": "a star", "original_size": [480, 640], "prompt_2": "a moon"}\n')
    assert latentrt("run", "sample", "--prompts", lines, *QUICK, "-o", tmp_path / "line.png").code == 0
    assert [feeds["time_ids"][0].tolist() for feeds in xl.fed] == [
        [480, 640, 16, 8, 64, 96],
        [64, 96, 0, 0, 512, 512],
        [480, 640, 0, 0, 64, 96],
        [480, 640, 16, 8, 64, 96],
        [480, 640, 0, 0, 64, 96],
    ]
    record = read_metadata(tmp_path / "line.png").record
    assert record is not None
    assert record.options["prompt_2"] == "a moon"


@pytest.mark.parametrize(
    "option",
    [
        ("--original-size", "64xx"),
        ("--original-size", "2000000"),
        ("--crops-coords-top-left", "8"),
        ("--crops-coords-top-left", "8,-1"),
        ("--denoising-end", "0"),
        ("--aesthetic-score", "6"),
        ("--negative-prompt-2", "a moon"),
    ],
    ids=" ".join,
)
def test_a_wrong_value_is_refused_by_its_flag(
    latentrt: Caller, tmp_path: Path, xl: XL, option: tuple[str, str]
) -> None:
    done = latentrt("run", "sample", "a star", *QUICK, *option, "-o", tmp_path / "out.png")
    assert done.code == 2
    assert option[0] in done.err
    assert not xl.fed

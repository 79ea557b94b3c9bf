"""`latentrt run --refiner`: two bundles, one image."""

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

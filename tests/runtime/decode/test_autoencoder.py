"""Which decoder makes an order's pixels, and from how much at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt import Pipeline
from latentrt.bundle.sample import bundle_path

DEFAULT_SIDE = 64  # of the sample model
DRAWN: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 1, "seed": 3, "safety": "off"}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(bundle_path(), device="cpu")


def test_tiles_are_for_what_is_larger_than_the_model_was_made_for(pipeline: Pipeline) -> None:
    whole, tiled = (pipeline(**DRAWN, output_type="np", decoder=decoder).images for decoder in ("full", "tiled"))
    np.testing.assert_array_equal(whole, tiled)
    size: dict[str, Any] = {"width": 2 * DEFAULT_SIDE, "height": DEFAULT_SIDE}
    whole, tiled = (pipeline(**DRAWN, **size, output_type="np", decoder=name).images for name in ("full", "tiled"))
    assert whole.shape == tiled.shape == (1, DEFAULT_SIDE, 2 * DEFAULT_SIDE, 3)
    assert 0 < np.abs(whole - tiled).mean() < 0.1


def test_a_picture_in_tiles_says_so(pipeline: Pipeline) -> None:
    result = pipeline(**DRAWN, decoder="tiled")
    assert result.records[0].decoder == "tiled"

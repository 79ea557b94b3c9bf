from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt.bundle.manifest import Preprocessing
from latentrt.errors import RequestError
from latentrt.images.feature_extractors import ClipPreprocessing, depth_to_latents, preprocess
from latentrt.images.inputs import load_image


def test_clip_crops_the_centre_of_a_wide_image() -> None:
    stripes = np.zeros((224, 672, 3), np.uint8)
    stripes[:, 224:448] = 255
    values = ClipPreprocessing(mean=(0, 0, 0), std=(1, 1, 1)).pixel_values(load_image(stripes))
    assert values.shape == (1, 3, 224, 224)
    assert values.dtype == np.float32
    assert (values == 1).all()


def test_clip_normalizes_each_channel() -> None:
    preprocessing = ClipPreprocessing(shortest_edge=8, crop=4, mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    values = preprocessing.pixel_values(load_image(np.full((8, 8, 3), 255, np.uint8)))
    assert values.shape == (1, 3, 4, 4)
    assert values[0, :, 0, 0].tolist() == [1, 1, 0]


def test_a_crop_beyond_the_resized_image_is_refused() -> None:
    with pytest.raises(ValueError, match="crop=225"):
        ClipPreprocessing(crop=225)


def test_an_image_is_resized_and_normalized_as_the_bundle_says() -> None:
    preprocessing = Preprocessing(height=4, width=6, resample="bilinear", mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 0.25))
    values = preprocess(load_image(np.full((9, 5, 3), 255, np.uint8)), preprocessing)
    assert values.shape == (1, 3, 4, 6)
    assert values.dtype == np.float32
    assert values[0, :, 0, 0].tolist() == [1, 1, 0]


@pytest.mark.parametrize("size", [(1, 2_000_000), (2_000_000, 1)])
def test_an_extreme_aspect_ratio_is_refused(size: tuple[int, int]) -> None:
    image = load_image(Image.new("RGB", size), "control_image")
    with pytest.raises(RequestError, match=r"`control_image`.*crop"):
        ClipPreprocessing().pixel_values(image)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("batch", [(), (1,)])
def test_depth_is_scaled_to_its_range(dtype: type[np.floating], batch: tuple[int, ...]) -> None:
    depth = np.linspace(100, 900, 32 * 48).reshape(*batch, 32, 48).astype(dtype)
    latents = depth_to_latents(depth, 64, 96)
    assert latents.shape == (1, 1, 8, 12)
    assert latents.dtype == np.float32
    assert (latents.min(), latents.max()) == (-1, 1)
    assert latents[0, 0, 0, 0] == -1
    assert latents[0, 0, -1, -1] == 1


@pytest.mark.parametrize(
    ("depth", "reason"),
    [
        (np.ones((8, 8), np.float32), "depth 1 everywhere"),
        (np.full((8, 8), np.nan, np.float32), "NaN"),
        (np.array([[0, 1e300]]), "infinity"),
        (np.ones((2, 8, 8), np.float32), "shape"),
        (np.ones((1, 1, 8, 8), np.float32), "shape"),
        (np.ones((0, 8), np.float32), "shape"),
        (np.ones((8, 8), np.uint8), "uint8"),
    ],
)
def test_a_depth_map_without_a_scale_is_refused(depth: NDArray[Any], reason: str) -> None:
    with pytest.raises(RequestError, match=f"`depth_map`.*{reason}"):
        depth_to_latents(depth, 64, 64)

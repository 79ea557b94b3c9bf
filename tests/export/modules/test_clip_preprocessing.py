"""CLIP's preprocessing against transformers' processor, and the configurations that it accepts and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.preprocessor_config import read_preprocessor_config
from latentrt_export.modules.clip_preprocessing import ClipPreprocessing
from tests.clip_oracle import generate_images, preprocess, write_processor


@pytest.mark.parametrize("sizes", [(224, 224), (63, 56)])  # the second crops, by an odd number
def test_levels_are_pillows(sizes: tuple[int, int], tmp_path: Path) -> None:
    config = {"size": {"shortest_edge": sizes[0]}, "crop_size": {"height": sizes[1], "width": sizes[1]}}
    preprocessing = ClipPreprocessing(read_preprocessor_config(write_processor(tmp_path, config)))
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path, do_rescale=False, do_normalize=False)
    off, count = 0, 0
    for image in generate_images(200):
        levels = preprocessing.resize(torch.from_numpy(image)[None])
        difference = torch.abs(levels - preprocess(processor, image))
        assert difference.max() <= 1, image.shape
        off, count = off + int(difference.sum()), count + difference.numel()
    assert off / count <= 1e-4  # measured 2e-5: weights are computed in float32, where Pillow has float64


@pytest.mark.parametrize("shape", [(1, 4096), (600, 4), (2048, 1536)])
def test_levels_of_extreme_sizes(shape: tuple[int, int], tmp_path: Path) -> None:
    preprocessing = ClipPreprocessing(
        read_preprocessor_config(write_processor(tmp_path, {"size": 32, "crop_size": 32}))
    )
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path, do_rescale=False, do_normalize=False)
    image = np.random.default_rng(3).integers(0, 256, (*shape, 3), dtype=np.uint8)
    levels = preprocessing.resize(torch.from_numpy(image)[None])
    assert torch.equal(levels, preprocess(processor, image).float())


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"height": 40, "width": 30}, "crop_size": 24},
        {"size": {"height": 40, "width": 30}, "do_center_crop": False},
        {
            "size": {"shortest_edge": 31},
            "crop_size": {"height": 24, "width": 31},
            "do_rescale": False,
            "do_normalize": False,
        },
        {"size": [40, 30], "crop_size": [24, 20]},
        {"size": 40, "crop_size": 24, "default_to_square": True},
        {"size": 40, "use_square_size": True},
        {"size": [24, 24], "do_center_crop": None, "do_normalize": None, "do_rescale": None, "do_pad": None},
        {"size": 24, "crop_size": 24, "rescale_factor": 0.01, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]},
    ],
)
def test_configurations_are_read_as_in_transformers(config: dict[str, Any], tmp_path: Path) -> None:
    path = write_processor(tmp_path, config)
    image = next(generate_images(1))
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"]
    found = ClipPreprocessing(read_preprocessor_config(path))(torch.from_numpy(image)[None])
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # this image has no level off by one


@pytest.mark.parametrize("resample", ["bicubic", "BICUBIC", "PILImageResampling.BICUBIC", 3])
@pytest.mark.parametrize("type_key", [None, "image_processor_type", "feature_extractor_type"])
def test_a_filter_by_name_is_that_by_number_with_and_without_a_type(
    resample: object, type_key: str | None, tmp_path: Path
) -> None:
    config = {"resample": resample} | ({} if type_key is None else {type_key: "CLIPFeatureExtractor"})
    found = read_preprocessor_config(write_processor(tmp_path, config))
    assert found == read_preprocessor_config(write_processor(tmp_path, {}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"do_resize": False}, "do_resize is false"),
        ({"resample": "bilinear"}, "got resample 'bilinear', expected 3"),
        ({"resample": None}, "got resample None, expected a number below 6"),
        ({"size": None}, "got size None"),
        ({"image_mean": None}, "got image_mean None"),
        ({"do_resize": None}, "do_resize is false"),
        ({"resample": "sinc"}, "got resample 'sinc', expected a number below 6"),
        ({"resample": True}, "got resample True, expected a number below 6"),
        ({"resample": 6}, "got resample 6, expected a number below 6"),
        ({"size": [1, 2, 3]}, r"got size \[1, 2, 3\]"),
        ({"rescale_factor": float("nan")}, "rescale_factor: NaN"),
        ({"rescale_factor": 0}, "got rescale_factor 0, expected a number of 1e-06"),
        ({"rescale_factor": float("inf")}, "got rescale_factor inf"),
        ({"rescale_factor": -1 / 255}, "got rescale_factor -0"),
        ({"rescale_factor": 10**400}, "got rescale_factor 1000"),
        ({"rescale_factor": "1/255"}, "got rescale_factor '1/255'"),
        ({"image_std": [0.5, 0, 0.5]}, r"got image_std \[0.5, 0, 0.5\], expected three numbers of 1e-06"),
        ({"image_std": [float("inf"), 1, 1]}, "got image_std"),
        ({"image_std": [1, 1, -1]}, "got image_std"),
        ({"image_std": [1e-50, 1, 1]}, "got image_std"),
        ({"image_std": [1, 10**400, 1]}, "got image_std"),
        ({"image_mean": [0, float("-inf"), 0]}, "got image_mean"),
        ({"image_mean": ["0.5", 0, 0]}, "got image_mean"),
        ({"resample": 2}, "got resample 2, expected 3"),
        ({"do_center_crop": False}, "do_center_crop is false"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "got size"),
        ({"size": 224, "crop_size": 300}, "larger than the resized image"),
        ({"crop_size": "224"}, "got crop_size '224'"),
        ({"image_mean": [0.5]}, "got image_mean"),
        ({"image_processor_type": "ViTImageProcessor"}, "got image processor 'ViTImageProcessor'"),
        ({"feature_extractor_type": "ViTFeatureExtractor"}, "got image processor 'ViTFeatureExtractor'"),
        ({"feature_extractor_type": None}, "got image processor None"),
        ({"feature_extractor_type": ["CLIPFeatureExtractor"]}, "got image processor"),
        ({"do_pad": True}, "do_pad is true"),
        ([], "holds a list, expected an object"),
    ],
)
def test_configurations_that_cannot_be_honoured_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_preprocessor_config(write_processor(tmp_path, config))


@pytest.mark.parametrize("text", [None, "{"])
def test_a_configuration_that_cannot_be_read_is_refused(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "preprocessor_config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CheckpointError, match=r"cannot be read|is not JSON"):
        read_preprocessor_config(path)

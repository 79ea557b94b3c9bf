"""Oracles: transformers' Pillow processors, and the depth map of diffusers' depth-to-image pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

from latentrt.bundle.manifest import Preprocessing
from latentrt.images.feature_extractors import ClipPreprocessing, depth_to_latents, preprocess
from latentrt.images.inputs import load_image

SIZES = [(1, 1), (224, 224), (640, 480), (479, 641), (223, 500), (37, 1000), (512, 513)]


def random_image(size: tuple[int, int]) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("preprocessing", "config"),
    [
        (ClipPreprocessing(), {}),
        (
            ClipPreprocessing(shortest_edge=33, crop=30, mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3)),
            {
                "size": {"shortest_edge": 33},
                "crop_size": {"height": 30, "width": 30},
                "image_mean": [0.5, 0.4, 0.3],
                "image_std": [0.1, 0.2, 0.3],
            },
        ),
        (ClipPreprocessing(resample=Image.Resampling.BILINEAR), {"resample": 2}),
    ],
    ids=["default", "small", "bilinear"],
)
def test_clip_equals_transformers(
    size: tuple[int, int], preprocessing: ClipPreprocessing, config: dict[str, Any]
) -> None:
    image = random_image(size)
    expected = CLIPImageProcessorPil(**config)(images=image, return_tensors="np").pixel_values
    # Bit for bit: the same Pillow resampling and the same float32 operations in the same order.
    assert np.array_equal(preprocessing.pixel_values(load_image(image)), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("preprocessing", "config"),
    [
        (Preprocessing(height=384, width=384, resample="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)), {}),
        (
            Preprocessing(height=96, width=128, resample="bilinear", mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3)),
            {
                "size": {"height": 96, "width": 128},
                "resample": 2,
                "image_mean": [0.4, 0.5, 0.6],
                "image_std": [0.1, 0.2, 0.3],
            },
        ),
    ],
    ids=["default", "bilinear"],
)
def test_dpt_equals_transformers(size: tuple[int, int], preprocessing: Preprocessing, config: dict[str, Any]) -> None:
    image = random_image(size)
    expected = DPTImageProcessorPil(**config)(images=image, return_tensors="np").pixel_values
    # Bit for bit, as above.
    assert np.array_equal(preprocess(load_image(image), preprocessing), expected)


@pytest.mark.parametrize(
    ("size", "depth_size"), [((512, 512), (384, 384)), ((760, 333), (384, 384)), ((64, 64), (9, 5))]
)
def test_depth_equals_diffusers(size: tuple[int, int], depth_size: tuple[int, int]) -> None:
    depth = np.random.default_rng(0).uniform(0, 3000, (1, *depth_size)).astype(np.float32)
    pipeline = StableDiffusionDepth2ImgPipeline.__new__(StableDiffusionDepth2ImgPipeline)
    pipeline.vae_scale_factor = 8
    expected = pipeline.prepare_depth_map(
        random_image(size), torch.from_numpy(depth), 1, False, torch.float32, torch.device("cpu")
    )
    # torch's bicubic weights are float32: 4e-5 of the largest value (`test_interpolation`), here scaled to ±1.
    assert np.abs(depth_to_latents(depth, size[1], size[0]) - expected.numpy()).max() <= 4e-5

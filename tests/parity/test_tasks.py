"""Image to image and inpainting beside diffusers' own pipelines: the same checkpoint, prompt, seed, image; float32.

Bounds as in test_text_to_image.py: latents within 1e-4 of their largest, pixels within 2 of 255.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from numpy.typing import NDArray
from PIL import Image

from latentrt import Pipeline
from latentrt.bundle.gate_inputs import make_images
from tests.exported import Exported

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)  # of the oracle's own dependencies

LATENTS_BOUND = 1e-4
PIXELS_BOUND = 2
PROMPT = "a red circle on a blue background"
SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
}


def input_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(make_images(1, height, width)[0])


def input_mask(width: int, height: int) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : -height // 4, width // 3 :] = 255
    return Image.fromarray(mask)


def compare(
    pipeline: Pipeline, pipe: Any, sampler: str, seeds: list[int], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """Generate with both, latents and pixels, and compare."""
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)

    def generate(output_type: str) -> NDArray[Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        made = pipe(generator=generators, output_type=output_type, **theirs).images
        return np.asarray(made)

    # The safety checker of a tiny checkpoint flags at random; both run without.
    pipe.safety_checker = None
    common = {**ours, "seed": seeds, "sampler": sampler, "safety": "off"}
    expected, found = generate("latent"), pipeline(output_type="latent", **common).images
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= LATENTS_BOUND * np.abs(expected).max()
    pixels, made = generate("np"), pipeline(output_type="np", **common).images
    assert made.shape == pixels.shape
    assert np.abs(np.rint(made * 255) - np.rint(pixels * 255)).max() <= PIXELS_BOUND


GUIDANCE: list[dict[str, Any]] = [{"guidance_scale": 1.0}, {"guidance_scale": 7.5, "negative_prompt": "a green square"}]


@pytest.mark.parametrize("guidance", GUIDANCE, ids=["unguided", "guided"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (91, 75)])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_image_to_image(
    sd1: Exported, sampler: str, width: int, height: int, images: int, guidance: dict[str, Any]
) -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(sd1.checkpoint)
    common = {
        "prompt": PROMPT,
        "image": input_image(width, height),
        "strength": 0.6,
        "num_inference_steps": 7,
        "num_images_per_prompt": images,
        **guidance,
    }
    compare(Pipeline.load(sd1.bundle, device="cpu"), pipe, sampler, list(range(5, 5 + images)), common, common)


@pytest.mark.parametrize("guidance", GUIDANCE, ids=["unguided", "guided"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (88, 72)])
@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_inpainting_with_four_channels(
    sd1: Exported, sampler: str, width: int, height: int, images: int, guidance: dict[str, Any], strength: float
) -> None:
    pipe = StableDiffusionInpaintPipeline.from_pretrained(sd1.checkpoint)
    image, mask = input_image(width + 13, height + 5), input_mask(width + 13, height + 5)
    common: dict[str, Any] = {
        "height": height,
        "width": width,
        "strength": strength,
        "num_inference_steps": 6,
        **guidance,
    }
    ours = {**common, "prompt": PROMPT, "num_images_per_prompt": images, "image": image, "mask_image": mask}
    # Lists, so that each image's generator encodes it; one image of several seeds would be encoded by the first alone.
    negative = {"negative_prompt": [guidance["negative_prompt"]] * images} if "negative_prompt" in guidance else {}
    theirs = {**common, "prompt": [PROMPT] * images, "image": [image] * images, "mask_image": [mask] * images}
    seeds = list(range(5, 5 + images))
    compare(Pipeline.load(sd1.bundle, device="cpu"), pipe, sampler, seeds, ours, {**theirs, **negative})

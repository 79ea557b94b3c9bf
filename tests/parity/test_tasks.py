"""Tasks compared with diffusers' own pipelines: the same checkpoint, prompt, seed, image; float32.

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
    StableDiffusionInstructPix2PixPipeline,
)
from numpy.typing import NDArray
from PIL import Image

from latentrt import Pipeline
from latentrt.bundle.gate_inputs import make_images
from latentrt.errors import RequestError
from tests.exported import Exported, exported_task

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


@pytest.fixture(scope="session")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny inpainting model of 9 channels."""
    return exported_task(tmp_path_factory, "inpainting")


@pytest.fixture(scope="session")
def edit(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny InstructPix2Pix model."""
    return exported_task(tmp_path_factory, "edit")


@pytest.mark.parametrize("guidance", GUIDANCE, ids=["unguided", "guided"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (88, 72)])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "heun", "pndm"])
@pytest.mark.parametrize("strength", [1.0, 0.7])
@pytest.mark.parametrize("model", ["sd1", "inpainting"])
def test_inpainting(
    request: pytest.FixtureRequest,
    model: str,
    sampler: str,
    width: int,
    height: int,
    images: int,
    guidance: dict[str, Any],
    strength: float,
) -> None:
    """By blending with 4 channels, by extra channels with 9."""
    exported: Exported = request.getfixturevalue(model)
    pipe = StableDiffusionInpaintPipeline.from_pretrained(exported.checkpoint)
    ours, theirs = inpainting_call(width, height, images, strength, guidance)
    seeds = list(range(5, 5 + images))
    compare(Pipeline.load(exported.bundle, device="cpu"), pipe, sampler, seeds, ours, theirs)


def inpainting_call(
    width: int, height: int, images: int, strength: float, guidance: dict[str, Any], **more: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return our keywords, and diffusers' with lists, so that each image's generator encodes it.

    With one image for several seeds diffusers encodes it by the first generator alone.
    """
    image, mask = input_image(width + 13, height + 5), input_mask(width + 13, height + 5)
    common = {"height": height, "width": width, "strength": strength, "num_inference_steps": 6, **guidance, **more}
    ours = {**common, "prompt": PROMPT, "num_images_per_prompt": images, "image": image, "mask_image": mask}
    negative = {"negative_prompt": [guidance["negative_prompt"]] * images} if "negative_prompt" in guidance else {}
    theirs = {**common, "prompt": [PROMPT] * images, "image": [image] * images, "mask_image": [mask] * images}
    return ours, theirs | negative


@pytest.mark.parametrize("model", ["sd1", "inpainting"])
def test_inpainting_of_a_crop(request: pytest.FixtureRequest, model: str) -> None:
    """`padding_mask_crop` repaints a crop around the mask and puts it back: images of the input's size."""
    exported: Exported = request.getfixturevalue(model)
    pipe = StableDiffusionInpaintPipeline.from_pretrained(exported.checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = SCHEDULERS["ddim"].from_config(pipe.scheduler.config)
    image, mask = input_image(150, 130), input_mask(150, 130)
    common: dict[str, Any] = {"prompt": PROMPT, "image": image, "mask_image": mask, "padding_mask_crop": 8}
    common |= {"height": 64, "width": 64, "num_inference_steps": 4, "strength": 0.8}
    expected = pipe(generator=torch.Generator().manual_seed(3), **common).images[0]
    pipeline = Pipeline.load(exported.bundle, device="cpu")
    found = pipeline(seed=3, sampler="ddim", safety="off", **common).images[0]
    assert found.size == expected.size == (150, 130)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected.convert("RGB")).astype(int))
    assert difference.max() <= PIXELS_BOUND


EDITS = [
    {"guidance_scale": 1.0},
    {"guidance_scale": 7.5},
    {"guidance_scale": 5.0, "image_guidance_scale": 2.0, "negative_prompt": "a green square"},
]


@pytest.mark.parametrize("guidance", EDITS, ids=["unguided", "guided", "both scales"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (91, 75)])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
def test_instruct_pix2pix(
    edit: Exported, sampler: str, width: int, height: int, images: int, guidance: dict[str, Any]
) -> None:
    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(edit.checkpoint)
    image = input_image(width, height)
    common = {"num_inference_steps": 5, **guidance}
    ours = {**common, "prompt": PROMPT, "image": image, "num_images_per_prompt": images}
    negative = {"negative_prompt": [guidance["negative_prompt"]] * images} if "negative_prompt" in guidance else {}
    theirs = {**common, "prompt": [PROMPT] * images, "image": [image] * images, **negative}
    compare(Pipeline.load(edit.bundle, device="cpu"), pipe, sampler, list(range(5, 5 + images)), ours, theirs)


def test_a_bundle_refuses_other_tasks(sd1: Exported, inpainting: Exported, edit: Exported) -> None:
    image, mask = input_image(64, 64), input_mask(64, 64)
    for bundle, call in (
        (inpainting.bundle, {"prompt": PROMPT}),
        (inpainting.bundle, {"prompt": PROMPT, "image": image}),
        (edit.bundle, {"prompt": PROMPT}),
        (edit.bundle, {"prompt": PROMPT, "image": image, "mask_image": mask}),
        (edit.bundle, {"prompt": PROMPT, "image": image, "strength": 0.5}),
        (sd1.bundle, {"prompt": PROMPT, "image": image, "image_guidance_scale": 2.0}),
    ):
        with pytest.raises(RequestError):
            Pipeline.load(bundle, device="cpu")(safety="off", **call)

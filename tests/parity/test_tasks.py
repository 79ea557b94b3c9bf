"""Tasks compared with diffusers' own pipelines: the same checkpoint, prompt, seed, image; float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)

from latentrt import Pipeline
from latentrt.errors import RequestError
from tests.exported import Exported, exported_task
from tests.parity.pipelines import (
    GUIDANCE,
    IGNORED_WARNINGS,
    PIXELS_BOUND,
    PROMPT,
    SCHEDULERS,
    assert_close,
    compare,
    input_image,
    input_mask,
    run_oracle,
)

pytestmark = IGNORED_WARNINGS
Pair = tuple[Pipeline, Any]  # ours and diffusers'


@pytest.fixture(scope="session")
def inpainting(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny inpainting model of 9 channels."""
    return exported_task(tmp_path_factory, "inpainting")


@pytest.fixture(scope="session")
def edit(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny InstructPix2Pix model."""
    return exported_task(tmp_path_factory, "edit")


@pytest.fixture(scope="module")
def image_to_image_pair(sd1: Exported) -> Pair:
    return load(sd1, StableDiffusionImg2ImgPipeline)


@pytest.fixture(scope="module", params=["sd1", "inpainting"])
def inpainting_pair(request: pytest.FixtureRequest) -> Pair:
    return load(request.getfixturevalue(request.param), StableDiffusionInpaintPipeline)


@pytest.fixture(scope="module")
def edit_pair(edit: Exported) -> Pair:
    return load(edit, StableDiffusionInstructPix2PixPipeline)


def load(model: Exported, pipeline_class: Any) -> Pair:
    return Pipeline.load(model.bundle, device="cpu"), pipeline_class.from_pretrained(model.checkpoint)


@pytest.mark.parametrize("guidance", GUIDANCE, ids=["unguided", "guided"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (91, 75)])
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler_a", "dpmpp_2m", "heun"])
def test_image_to_image(
    image_to_image_pair: Pair, sampler: str, width: int, height: int, images: int, guidance: dict[str, Any]
) -> None:
    call = {"prompt": PROMPT, "image": input_image(width, height), "strength": 0.6, "num_inference_steps": 7}
    compare(*image_to_image_pair, sampler, images, call | guidance)


@pytest.mark.parametrize("given", [1, 2])
def test_latents_in_place_of_an_image(image_to_image_pair: Pair, given: int) -> None:
    """Of all images, or of each."""
    pipeline, pipe = image_to_image_pair
    pipe.set_progress_bar_config(disable=True)
    pipe.safety_checker = None
    pipe.scheduler = SCHEDULERS["ddim"].from_config(pipe.scheduler.config)
    latents = np.random.default_rng(1).standard_normal((given, 4, 9, 8)).astype(np.float32)
    common: dict[str, Any] = {"strength": 0.6, "num_inference_steps": 5, "guidance_scale": 3.0}
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    expected = run_oracle(pipe, prompt=[PROMPT] * 2, image=torch.from_numpy(latents), generator=generators, **common)
    own = {"prompt": PROMPT, "num_images_per_prompt": 2, "seed": [5, 6], "sampler": "ddim", "safety": "off"}
    assert_close(pipeline, {**common, **own, "image": latents}, *expected)


@pytest.mark.parametrize("guidance", GUIDANCE, ids=["unguided", "guided"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (88, 72)])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "heun"])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_inpainting(
    inpainting_pair: Pair,
    sampler: str,
    width: int,
    height: int,
    images: int,
    guidance: dict[str, Any],
    strength: float,
) -> None:
    """By blending with 4 channels, by extra channels with 9."""
    image, mask = input_image(width + 13, height + 5), input_mask(width + 13, height + 5)
    call = {"prompt": PROMPT, "image": image, "mask_image": mask, "height": height, "width": width}
    compare(*inpainting_pair, sampler, images, {**call, "strength": strength, "num_inference_steps": 6, **guidance})


def test_inpainting_of_a_crop(inpainting_pair: Pair) -> None:
    """`padding_mask_crop` repaints a crop around the mask and puts it back: images of the input's size."""
    pipeline, pipe = inpainting_pair
    pipe.set_progress_bar_config(disable=True)
    pipe.safety_checker = None
    pipe.scheduler = SCHEDULERS["ddim"].from_config(pipe.scheduler.config)
    image, mask = input_image(150, 130), input_mask(150, 130)
    common: dict[str, Any] = {"prompt": PROMPT, "image": image, "mask_image": mask, "padding_mask_crop": 8}
    common |= {"height": 64, "width": 64, "num_inference_steps": 4, "strength": 0.8}
    expected = pipe(generator=torch.Generator().manual_seed(3), **common).images[0]
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
    edit_pair: Pair, sampler: str, width: int, height: int, images: int, guidance: dict[str, Any]
) -> None:
    call = {"prompt": PROMPT, "image": input_image(width, height), "num_inference_steps": 5}
    compare(*edit_pair, sampler, images, call | guidance)


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

"""Our pipeline and diffusers' of the same class, on the same checkpoint, request and seeds, in float32.

Bounds: final latents within 1e-4 of their largest (the graphs are 1e-6 from torch per evaluation, and guidance of 7.5
multiplies the difference of two of them, at every step), pixels within 2 of 255 (the decoder rounds values that close
to an edge differently).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from numpy.typing import NDArray
from PIL import Image

from latentrt import Pipeline, Request
from latentrt.bundle.gate_inputs import make_images

LATENTS_BOUND = 1e-4
PIXELS_BOUND = 2
PROMPT = "a red circle on a blue background"
GUIDANCE: list[dict[str, Any]] = [{"guidance_scale": 1.0}, {"guidance_scale": 7.5, "negative_prompt": "a green square"}]
SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpmpp_2m": DPMSolverMultistepScheduler,
    "heun": HeunDiscreteScheduler,
}
# Of the oracle's own dependencies.
IGNORED_WARNINGS = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)


def input_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(make_images(1, height, width)[0])


def input_mask(width: int, height: int) -> Image.Image:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : -height // 4, width // 3 :] = 255
    return Image.fromarray(mask)


def as_lists(call: dict[str, Any], images: int) -> dict[str, Any]:
    """Repeat texts and input images for several generators.

    diffusers encodes a single input with the first generator only; from a list, it encodes each image with its own.
    """
    repeated = {"prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "image", "mask_image"}
    return {name: [value] * images if name in repeated else value for name, value in call.items()}


def compare(
    pipeline: Pipeline,
    oracle: Any,
    sampler: str,
    images: int,
    call: dict[str, Any],
    *,
    scheduler: Callable[[list[torch.Generator]], Any] | None = None,
    ours: dict[str, Any] | None = None,
    theirs: dict[str, Any] | None = None,
) -> None:
    """Run our pipeline and diffusers', and compare latents and pixels.

    Args:
        sampler: our name of it, and the key of diffusers' class in `SCHEDULERS`.
        images: number of images, each with its own seed.
        call: keywords of both, with one prompt and one input image.
        scheduler: makes diffusers' scheduler from the images' generators, instead of `SCHEDULERS`.
        ours, theirs: further keywords of one of the two.
    """
    seeds = list(range(5, 5 + images))
    oracle.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if scheduler is None:
        config = oracle.scheduler.load_config(oracle.config["_name_or_path"], subfolder="scheduler")
        oracle.scheduler = SCHEDULERS[sampler].from_config(config)
    else:
        oracle.scheduler = scheduler(generators)
    # The safety checker of a tiny checkpoint flags at random; both run without.
    oracle.safety_checker = None
    latents, pixels = run_oracle(oracle, generator=generators, **as_lists(call, images), **(theirs or {}))
    common = {**call, "num_images_per_prompt": images, "seed": seeds, "sampler": sampler, "safety": "off"}
    assert_close(pipeline, {**common, **(ours or {})}, latents, pixels)


def run_oracle(oracle: Any, **call: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Run diffusers' pipeline once; return the latents that it decodes, and the pixels, float32 in 0 … 1."""
    decoded: list[torch.Tensor] = []
    decode = oracle.vae.decode

    def record(latents: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        decoded.append(latents)
        return decode(latents, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle.vae, "decode", record)
        pixels = oracle(output_type="np", **call).images
    (latents,) = decoded
    config = oracle.vae.config
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (config.latents_mean, config.latents_std))
        latents = (latents - mean) / std
    return (latents * config.scaling_factor).numpy(), pixels


def assert_close(
    pipeline: Pipeline, call: dict[str, Any], latents: NDArray[np.float32], pixels: NDArray[np.float32]
) -> None:
    """Run our pipeline, and compare with diffusers' latents [images, C, H, W] and pixels [images, H, W, 3], 0 … 1."""
    request = pipeline.resolve(Request.of(**call))
    *_, last = pipeline.steps(request)
    assert last.latents.shape == latents.shape
    assert np.abs(last.latents - latents).max() <= LATENTS_BOUND * np.abs(latents).max()
    made = np.stack([np.asarray(image) for image in pipeline.finish(request, last.latents).images])
    assert made.shape == pixels.shape
    assert np.abs(made - np.rint(pixels * 255)).max() <= PIXELS_BOUND

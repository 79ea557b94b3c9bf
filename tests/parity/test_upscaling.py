"""Upscaling compared with diffusers' own pipeline: the same checkpoint, prompt, seed, image; float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionUpscalePipeline

from latentrt import Pipeline
from latentrt.bundle.bundle import Bundle
from latentrt.errors import RequestError
from tests.exported import Exported, exported_task
from tests.parity.pipelines import GUIDANCE, IGNORED_WARNINGS, PROMPT, compare, input_image

pytestmark = [IGNORED_WARNINGS, pytest.mark.slow]


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny ×4 upscaler."""
    return exported_task(tmp_path_factory, "upscaling", "sd2", parts=True)


@pytest.fixture(scope="module")
def pipeline(upscaler: Exported) -> Pipeline:
    return Pipeline.load(upscaler.bundle, device="cpu")


@pytest.fixture(scope="module")
def oracle(upscaler: Exported) -> StableDiffusionUpscalePipeline:
    return StableDiffusionUpscalePipeline.from_pretrained(upscaler.checkpoint)


@pytest.mark.parametrize("guidance", GUIDANCE, ids=["unguided", "guided"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height", "level"), [(16, 16, None), (27, 21, 250)])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
def test_upscaling(
    pipeline: Pipeline,
    oracle: StableDiffusionUpscalePipeline,
    sampler: str,
    width: int,
    height: int,
    level: int | None,
    images: int,
    guidance: dict[str, Any],
) -> None:
    call: dict[str, Any] = {"prompt": PROMPT, "image": input_image(width, height), "num_inference_steps": 6, **guidance}
    compare(pipeline, oracle, sampler, images, call | ({} if level is None else {"noise_level": level}))


def generate(pipeline: Pipeline, **values: Any) -> Any:
    common: dict[str, Any] = {"image": input_image(16, 16), "seed": 1, "num_inference_steps": 3, "safety": "off"}
    return pipeline(PROMPT, **{**common, **values})


def test_the_result_is_four_times_larger(pipeline: Pipeline) -> None:
    result = generate(pipeline, image=input_image(19, 26))
    assert result.images[0].size == (64, 96)  # the input image is rounded down to multiples of 4
    options = result.records[0].options
    assert (options["width"], options["height"], options["noise_level"]) == (64, 96, 20)


def test_image_and_noise_level_change_the_result(pipeline: Pipeline) -> None:
    """A tiny random model might ignore them, and then the comparisons above would prove little."""
    usual = generate(pipeline, output_type="latent").images
    others = [
        generate(pipeline, output_type="latent", noise_level=0).images,
        generate(pipeline, output_type="latent", image=np.zeros((16, 16, 3), np.uint8)).images,
    ]
    for other in others:
        assert np.abs(other - usual).max() > 1e-2 * np.abs(usual).max()


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"noise_level": 351}, "`noise_level`.*350"),
        ({"noise_level": -1}, "`noise_level`"),
        ({"height": 128}, "`height`.*64"),
        ({"width": 60}, "`width`.*64"),
        ({"image": input_image(7, 16)}, "`image`.*8"),
        ({"image": None}, "text-to-image.*`image`"),
        ({"strength": 0.5}, "`strength`"),
        ({"mask_image": input_image(16, 16)}, "inpainting"),
        ({"depth_map": np.ones((8, 8), np.float32)}, "`depth_map`"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_impossible_requests(pipeline: Pipeline, values: dict[str, Any], option: str) -> None:
    with pytest.raises(RequestError, match=option):
        generate(pipeline, **values)


def test_the_bundle_has_the_noise_of_the_input_image(upscaler: Exported) -> None:
    manifest = Bundle.open(upscaler.bundle).manifest
    assert {*manifest.schedulers} == {"unet", "low_res_scheduler"}
    assert manifest.schedulers["low_res_scheduler"].class_name == "DDPMScheduler"
    assert manifest.limits.max_noise_level == 350
    assert manifest.latent_spaces["unet"].downscale == 4

"""Depth to image compared with diffusers' own pipeline: the same checkpoint, prompt, seed, image; float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline

from latentrt import Pipeline
from latentrt.bundle.bundle import Bundle
from latentrt.errors import RequestError
from tests.exported import Exported, exported_task
from tests.parity.pipelines import GUIDANCE, IGNORED_WARNINGS, PROMPT, compare, input_image

pytestmark = [IGNORED_WARNINGS, pytest.mark.slow]

CALL: dict[str, Any] = {"strength": 0.6, "num_inference_steps": 7}


@pytest.fixture(scope="module")
def depth(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny depth-to-image model."""
    return exported_task(tmp_path_factory, "depth-to-image", "sd2")


@pytest.fixture(scope="module")
def pipeline(depth: Exported) -> Pipeline:
    return Pipeline.load(depth.bundle, device="cpu")


@pytest.fixture(scope="module")
def oracle(depth: Exported) -> StableDiffusionDepth2ImgPipeline:
    return StableDiffusionDepth2ImgPipeline.from_pretrained(depth.checkpoint)


@pytest.mark.parametrize("guidance", GUIDANCE, ids=["unguided", "guided"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (91, 75)])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
def test_depth_to_image(
    pipeline: Pipeline,
    oracle: StableDiffusionDepth2ImgPipeline,
    sampler: str,
    width: int,
    height: int,
    images: int,
    guidance: dict[str, Any],
) -> None:
    call = {"prompt": PROMPT, "image": input_image(width, height), **CALL, **guidance}
    compare(pipeline, oracle, sampler, images, call)


def test_the_default_strength_is_that_of_diffusers(
    pipeline: Pipeline, oracle: StableDiffusionDepth2ImgPipeline
) -> None:
    call = {"prompt": PROMPT, "image": input_image(64, 72), "num_inference_steps": 7}
    compare(pipeline, oracle, "ddim", 1, call, theirs={"strength": 0.8})


def test_a_depth_map_takes_the_place_of_the_estimate(
    pipeline: Pipeline, oracle: StableDiffusionDepth2ImgPipeline
) -> None:
    given = np.random.default_rng(0).uniform(0, 3000, (37, 50)).astype(np.float32)
    call = {"prompt": PROMPT, "image": input_image(64, 72), **CALL}
    theirs = {"depth_map": torch.from_numpy(given)[None]}
    compare(pipeline, oracle, "ddim", 1, call, ours={"depth_map": given}, theirs=theirs)
    result = pipeline(PROMPT, image=input_image(64, 64), depth_map=given, seed=1, safety="off", num_inference_steps=2)
    assert result.records[0].given == ("depth_map",)


def test_the_depth_changes_the_image(pipeline: Pipeline) -> None:
    """A tiny random model might ignore it, and then the comparisons above would prove little."""
    call: dict[str, Any] = {"image": input_image(64, 64), "seed": 1, "safety": "off", "output_type": "latent", **CALL}
    estimated = pipeline(PROMPT, **call).images
    ramp = np.linspace(0, 1, 64, dtype=np.float32) * np.ones((64, 1), np.float32)
    given = pipeline(PROMPT, depth_map=ramp, **call).images
    assert np.abs(given - estimated).max() > 1e-2 * np.abs(estimated).max()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"image": None}, "text-to-image.*`image`"),
        ({"noise_level": 20}, "`noise_level`"),
        ({"depth_map": np.ones((3, 8, 8), np.float32)}, "`depth_map`.*shape"),
        ({"depth_map": np.ones((8, 8), np.float32)}, "`depth_map`.*everywhere"),
        ({"mask_image": input_image(64, 64)}, "inpainting"),
    ],
    ids=["no image", "noise level", "shape", "constant", "mask"],
)
def test_impossible_requests(pipeline: Pipeline, values: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        pipeline(PROMPT, **{"image": input_image(64, 64), "safety": "off", **values})


def test_the_bundle_says_how_the_estimator_sees_the_image(depth: Exported) -> None:
    component = Bundle.open(depth.bundle).manifest.components["depth_estimator"]
    preprocessing = component.preprocessing
    assert preprocessing is not None
    assert (preprocessing.height, preprocessing.width, preprocessing.resample) == (64, 64, "bilinear")
    assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.4, 0.6), (0.5, 0.4, 0.5))
    assert [gate.output for gate in component.graphs["float32"].gate] == ["predicted_depth"] * 2

"""Stable unCLIP compared with diffusers' own pipeline: the same checkpoint, prompt, image, seed; float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableUnCLIPImg2ImgPipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentrt import Pipeline, Request
from latentrt.errors import RequestError
from latentrt.sampling.noise import Generator
from tests.exported import Exported, exported_task
from tests.parity.pipelines import GUIDANCE, IGNORED_WARNINGS, PROMPT, compare, input_image

pytestmark = [IGNORED_WARNINGS, pytest.mark.slow]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_task(tmp_path_factory, "unclip")


@pytest.fixture(scope="module")
def pipeline(model: Exported) -> Pipeline:
    return Pipeline.load(model.bundle, device="cpu")


@pytest.fixture(scope="module")
def pipe(model: Exported) -> Any:
    # Pillow's preprocessing, which the graph repeats; torchvision's is another.
    processor = CLIPImageProcessorPil.from_pretrained(model.checkpoint / "feature_extractor")
    return StableUnCLIPImg2ImgPipeline.from_pretrained(model.checkpoint, feature_extractor=processor)


@pytest.mark.parametrize("guidance", GUIDANCE, ids=["unguided", "guided"])
@pytest.mark.parametrize(("images", "noise_level"), [(1, 0), (3, 400)])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (88, 72)])
@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
def test_unclip(
    pipeline: Pipeline,
    pipe: Any,
    sampler: str,
    width: int,
    height: int,
    images: int,
    noise_level: int,
    guidance: dict[str, Any],
) -> None:
    image = input_image(301, 173)  # of any size, which is not the result's
    size = {"height": height, "width": width}
    call = {"prompt": PROMPT, "image": image, **size, "num_inference_steps": 6, "noise_level": noise_level, **guidance}
    compare(pipeline, pipe, sampler, images, call)


@pytest.mark.parametrize("noise_level", [0, 37, 999])
def test_the_class_labels_are_the_noised_embedding(pipeline: Pipeline, pipe: Any, noise_level: int) -> None:
    image = input_image(301, 173)
    request = pipeline.resolve(Request.of(image=image, noise_level=noise_level, seed=7, safety="off"))
    (sample,) = pipeline.family.stages[0].begin(request)
    found = {name: each.conditioning.inputs["class_labels"] for name, each in sample._evaluations.items()}
    pixels = pipe.feature_extractor(images=image, return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = pipe.noise_image_embeddings(
            pipe.image_encoder(pixels).image_embeds, noise_level, generator=torch.Generator().manual_seed(7)
        )
    # Four times the measured error: sums of the encoder in another order, 1e-5.
    np.testing.assert_allclose(found["positive"], expected[0].numpy(), rtol=0, atol=4e-5)
    assert not found["negative"].any()
    generator = Generator(7)
    generator.normal((32,))
    np.testing.assert_array_equal(sample.latents, request.schedule.first_latents(generator.normal((4, 8, 8))))


def test_an_omitted_prompt_is_empty_and_the_noise_level_0(pipeline: Pipeline) -> None:
    call: dict[str, Any] = {"image": input_image(64, 64), "seed": 7, "num_inference_steps": 2, "safety": "off"}
    call["output_type"] = "latent"
    found, expected = pipeline(**call).images, pipeline("", noise_level=0, **call).images
    np.testing.assert_array_equal(found, expected)
    assert np.abs(pipeline("", noise_level=999, **call).images - found).max() > 1e-3


def test_a_noise_level_beyond_the_models_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(RequestError, match=r"`noise_level`: got 1000.*999"):
        pipeline(image=input_image(64, 64), noise_level=1000, safety="off")

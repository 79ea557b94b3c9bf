"""Latent upscaling compared with diffusers' own pipeline: the same checkpoint, prompt, seed, image; float32.

diffusers' pipeline runs Euler's scheduler alone: the others do not take x0 for the model output, or do not scale their
input. `Preconditioned` undoes the pipeline's preconditioning before such a scheduler's step, whose arithmetic is
diffusers' own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionLatentUpscalePipeline,
)
from torch import Tensor

from latentrt import Pipeline, Request
from latentrt.bundle.bundle import Bundle
from latentrt.errors import RequestError
from latentrt.families.latent_diffusion import LatentDiffusionStage
from tests.exported import Exported, exported_task
from tests.parity.pipelines import GUIDANCE, IGNORED_WARNINGS, PROMPT, compare, input_image

# Slow, as this task's export takes a minute of CI; `make test-slow` has it.
pytestmark = [IGNORED_WARNINGS, pytest.mark.slow]


class Preconditioned:
    """A scheduler that takes F of Karras et al. 2022 from the pipeline, and steps with v = −F.

    Attributes:
        generators: for its noise, as the pipeline passes none on.
    """

    generators: list[torch.Generator]

    def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
        if not sample.ndim:
            return torch.ones(())  # the pipeline multiplies F by it
        return super().scale_model_input(sample, timestep)  # type: ignore[misc, no-any-return]

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, **options: Any) -> Any:
        sigma = self.sigmas[self.index_for_timestep(timestep)]  # type: ignore[attr-defined]
        f = model_output - sample / (sigma**2 + 1)  # what the pipeline added
        return super().step(-f, timestep, sample, generator=self.generators, **options)  # type: ignore[misc]


class EulerAncestral(Preconditioned, EulerAncestralDiscreteScheduler):  # type: ignore[misc]
    pass


class DPMSolverMultistep(Preconditioned, DPMSolverMultistepScheduler):  # type: ignore[misc]
    pass


SCHEDULERS = {"euler": EulerDiscreteScheduler, "euler_a": EulerAncestral, "dpmpp_2m": DPMSolverMultistep}


@pytest.fixture(scope="module")
def upscaler(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny latent upscaler."""
    return exported_task(tmp_path_factory, "latent-upscaling", parts=True)


@pytest.fixture(scope="module")
def pipeline(upscaler: Exported) -> Pipeline:
    return Pipeline.load(upscaler.bundle, device="cpu")


@pytest.fixture(scope="module")
def oracle(upscaler: Exported) -> StableDiffusionLatentUpscalePipeline:
    return StableDiffusionLatentUpscalePipeline.from_pretrained(upscaler.checkpoint)


@pytest.mark.parametrize("guidance", [{"guidance_scale": 0.0}, *GUIDANCE], ids=["no prompt", "unguided", "guided"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (103, 69)])
@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_latent_upscaling(
    pipeline: Pipeline,
    oracle: StableDiffusionLatentUpscalePipeline,
    sampler: str,
    width: int,
    height: int,
    images: int,
    guidance: dict[str, Any],
) -> None:
    call: dict[str, Any] = {"prompt": PROMPT, "image": input_image(width, height), "num_inference_steps": 6, **guidance}
    prediction = "original_sample" if sampler == "euler" else "v_prediction"

    def make_scheduler(generators: list[torch.Generator]) -> Any:
        scheduler = SCHEDULERS[sampler].from_config(oracle.scheduler.config, prediction_type=prediction)
        scheduler.generators = generators
        return scheduler

    compare(pipeline, oracle, sampler, images, call, scheduler=make_scheduler)


def generate(pipeline: Pipeline, **values: Any) -> Any:
    common: dict[str, Any] = {"image": input_image(64, 96), "seed": 1, "num_inference_steps": 3, "safety": "off"}
    return pipeline(PROMPT, **{**common, **values})


def test_the_result_is_twice_as_large(pipeline: Pipeline) -> None:
    result = generate(pipeline, image=input_image(71, 103))
    assert result.images[0].size == (128, 192)  # the input image is rounded down to multiples of 8
    assert (result.records[0].options["width"], result.records[0].options["height"]) == (128, 192)


def test_image_and_prompt_change_the_result(pipeline: Pipeline) -> None:
    """A tiny random model might ignore them, and then the comparisons above would prove little."""
    usual = generate(pipeline, output_type="latent").images
    others = [
        generate(pipeline, output_type="latent", guidance_scale=0).images,
        generate(pipeline, output_type="latent", image=np.zeros((96, 64, 3), np.uint8)).images,
    ]
    for other in others:
        assert np.abs(other - usual).max() > 1e-2 * np.abs(usual).max()


def test_a_long_prompt_is_pooled_over_its_first_chunk(pipeline: Pipeline) -> None:
    stage = pipeline.family.stages[0]
    assert isinstance(stage, LatentDiffusionStage)
    words = "red circle " * 37  # 74 tokens, and the next word begins the second chunk
    pooled = []
    for prompt, chunks in ((words + "large", 1), (words + "large star", 2)):
        request = Request.of(prompt=prompt, image=input_image(64, 64), safety="off", guidance_scale=1)
        (encoded,) = stage.encode_prompts(pipeline.resolve(request))
        assert encoded["positive"].embeddings.shape == (chunks * 77, 32)
        pooled.append(encoded["positive"].pooled)
    assert pooled[0] is not None
    np.testing.assert_array_equal(pooled[0], pooled[1])


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"noise_level": 20}, "`noise_level`"),
        ({"clip_skip": 1}, "`clip_skip`"),
        ({"height": 64}, "`height`.*192"),
        ({"image": input_image(80, 64)}, "`image`.*80 × 64.*multiples of 32"),
        ({"image": input_image(63, 64)}, "`image`.*from 64 to 1024"),
        ({"image": None}, "text-to-image.*`image`"),
        ({"strength": 0.5}, "`strength`"),
        ({"negative_prompt_embeds": np.zeros((1, 77, 32), np.float32)}, "`negative_prompt_embeds`.*text"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_impossible_requests(pipeline: Pipeline, values: dict[str, Any], option: str) -> None:
    with pytest.raises(RequestError, match=option):
        generate(pipeline, **values)


def test_the_bundle_has_the_graphs_prediction_and_time(upscaler: Exported) -> None:
    manifest = Bundle.open(upscaler.bundle).manifest
    assert manifest.schedulers["unet"].config["prediction_type"] == "v_prediction"
    assert [spec.source for spec in manifest.components["unet"].inputs][1::2] == ["c-noise", "text_encoder.pooled"]
    assert manifest.side_multiple == 64
    assert (manifest.defaults.num_inference_steps, manifest.defaults.guidance_scale) == (75, 9.0)

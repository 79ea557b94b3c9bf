"""A model with parts of other models, compared with diffusers' pipelines: float32, the denoiser split.

One checkpoint has them all, so that one export serves: guidance distilled into the UNet (LCM), per-block settings as
lists, residual blocks with scale and shift, and a tiny autoencoder, whose encoder draws no noise.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from latentrt import Pipeline, Request
from latentrt.sampling.loop import step
from latentrt_export.checkpoints.checkpoint import GivenComponents
from latentrt_export.export import export_checkpoint
from tests.exported import Silent, exporting_in_process
from tests.parity.pipelines import (
    IGNORED_WARNINGS,
    LATENTS_BOUND,
    PIXELS_BOUND,
    PROMPT,
    SCHEDULERS,
    assert_close,
    compare,
    input_image,
    input_mask,
    run_oracle,
)
from tests.tiny import TEXT_WIDTH, Family, Task, autoencoder, make_checkpoint, move_off_initial_values

pytestmark = IGNORED_WARNINGS
SIZE: dict[str, Any] = {"height": 32, "width": 40}


def make_tiny_autoencoder() -> AutoencoderTiny:
    torch.manual_seed(4)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=0.7,
    )


def make_unet() -> UNet2DConditionModel:
    torch.manual_seed(5)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16,),
        layers_per_block=[1],
        norm_num_groups=8,
        cross_attention_dim=[TEXT_WIDTH],
        transformer_layers_per_block=[1],
        attention_head_dim=[4],
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        resnet_time_scale_shift="scale_shift",
        time_cond_proj_dim=32,
    )


def replace(folder: Path, name: str, module: Any) -> None:
    """Put another model in the place of a checkpoint's component."""
    shutil.rmtree(folder / name)
    move_off_initial_values(module)
    module.save_pretrained(folder / name)
    index = json.loads((folder / "model_index.json").read_text())
    index[name] = ["diffusers", type(module).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("assembled") / "checkpoint", safety="none", text_layers=1)
    replace(folder, "unet", make_unet())
    replace(folder, "vae", make_tiny_autoencoder())
    return folder


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> Pipeline:
    progress = Silent()
    with exporting_in_process():
        export_checkpoint(checkpoint, checkpoint.with_name("bundle"), progress=progress)
    assert [text for text in progress.warnings if "whole" in text] == []
    return Pipeline.load(checkpoint.with_name("bundle"), device="cpu", threads=1)


def oracle_of(checkpoint: Path, pipeline_class: Any) -> Any:
    components = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return pipeline_class.from_pretrained(checkpoint, **components)


def make_lcm(oracle: Any) -> Any:
    return lambda generators: LCMScheduler.from_config(oracle.scheduler.config)


@pytest.mark.parametrize("scale", [1.0, 8.1])  # 8.1 − 1 is not the same number in float32
def test_text_to_image_of_both_pipelines_with_distilled_guidance(
    pipeline: Pipeline, checkpoint: Path, scale: float
) -> None:
    assert {*pipeline.bundle.manifest.components["unet"].parts} == {"time_embedding", "cross_attention_kv", "body"}
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": scale, **SIZE}
    oracle = oracle_of(checkpoint, StableDiffusionPipeline)
    negative = {"negative_prompt": "a green square"}  # diffusers ignores it
    compare(pipeline, oracle, "lcm", 2, {**call, **negative}, scheduler=make_lcm(oracle))
    lcm = LatentConsistencyModelPipeline(
        **{**oracle.components, "scheduler": LCMScheduler.from_config(oracle.scheduler.config)},
        requires_safety_checker=False,
    )
    latents, pixels = run_oracle(lcm, generator=torch.Generator().manual_seed(5), **call)
    assert_close(pipeline, {**call, "seed": 5, "sampler": "lcm", "safety": "off"}, latents, pixels)


@pytest.mark.parametrize(
    ("oracle_class", "inputs"),
    [
        (StableDiffusionImg2ImgPipeline, {"image": input_image(40, 32), "strength": 0.6}),
        (
            StableDiffusionInpaintPipeline,
            {"image": input_image(40, 32), "mask_image": input_mask(40, 32), "strength": 0.8, **SIZE},
        ),
    ],
    ids=["image-to-image", "inpainting"],
)
def test_an_encoder_that_draws_no_noise(
    pipeline: Pipeline, checkpoint: Path, oracle_class: Any, inputs: dict[str, Any]
) -> None:
    call = {"prompt": PROMPT, "num_inference_steps": 5, "guidance_scale": 7.5, **inputs}
    compare(pipeline, oracle_of(checkpoint, oracle_class), "ddim", 2, call)


def test_each_sample_of_a_batch_has_its_own_guidance(pipeline: Pipeline) -> None:
    def begin(scale: float) -> Any:
        call: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "sampler": "ddim", "safety": "off", **SIZE}
        request = Request.of(**call, num_inference_steps=3, guidance_scale=scale)
        (sample,) = pipeline.family.stages[0].begin(pipeline.resolve(request))
        return sample

    def run(*samples: Any) -> list[Any]:
        denoiser = pipeline.family.stages[0].open_denoiser()
        while not samples[0].done:
            step(samples, denoiser)
        return [sample.latents for sample in samples]

    (low,), (high,) = run(begin(1.5)), run(begin(12.0))
    bound = LATENTS_BOUND * np.abs(low).max()
    assert np.abs(low - high).max() > 10 * bound, "the scale has an effect"
    for together, alone in zip(run(begin(1.5), begin(12.0)), (low, high), strict=True):
        np.testing.assert_allclose(together, alone, rtol=0, atol=bound)


def make_asymmetric_autoencoder() -> AsymmetricAutoencoderKL:
    torch.manual_seed(6)
    return AsymmetricAutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        down_block_out_channels=(8, 16),
        up_block_types=("UpDecoderBlock2D",) * 2,
        up_block_out_channels=(16, 32),
        layers_per_up_block=2,
        norm_num_groups=4,
        scaling_factor=0.3,
    )


def export_asymmetric(folder: Path, task: Task) -> Path:
    """Export a checkpoint with an asymmetric autoencoder; return the checkpoint's folder, which is beside `bundle`."""
    checkpoint = make_checkpoint(folder / "checkpoint", task=task, safety="none", text_layers=1)
    replace(checkpoint, "vae", make_asymmetric_autoencoder())
    progress = Silent()
    with exporting_in_process():
        export_checkpoint(checkpoint, folder / "bundle", progress=progress)
    assert not any("inpaint" in text for text in progress.warnings)
    return checkpoint


INPAINTING: dict[str, Any] = {"image": input_image(53, 37), "mask_image": input_mask(53, 37), "strength": 0.8, **SIZE}


@pytest.mark.slow  # an export
def test_an_asymmetric_autoencoder(tmp_path: Path) -> None:
    """It decodes an inpainted image with the input image and the mask, and those of other tasks without."""
    checkpoint = export_asymmetric(tmp_path, "text-to-image")
    pipeline = Pipeline.load(tmp_path / "bundle", device="cpu", threads=1)
    assert pipeline.bundle.manifest.tasks == ("text-to-image", "image-to-image", "inpainting")
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 7.5}
    compare(pipeline, oracle_of(checkpoint, StableDiffusionPipeline), "ddim", 2, {**call, **SIZE})
    images = {**call, "image": input_image(40, 32), "strength": 0.8}
    compare(pipeline, oracle_of(checkpoint, StableDiffusionImg2ImgPipeline), "ddim", 2, images)
    oracle = oracle_of(checkpoint, StableDiffusionInpaintPipeline)
    for sampler, count in (("ddim", 1), ("ddim", 2), ("euler_a", 2), ("heun", 1)):
        compare(pipeline, oracle, sampler, count, {**call, **INPAINTING})
    # The condition has an effect that the bound of pixels would show.
    request = pipeline.resolve(Request.of(**call, **INPAINTING, seed=5, sampler="ddim", safety="off"))
    *_, last = pipeline.steps(request)
    found = pipeline.finish(request, last.latents, "np").images
    plain = pipeline.resolve(Request.of(**call, **SIZE, seed=5, safety="off"))
    assert np.abs(found - pipeline.finish(plain, last.latents, "np").images).max() * 255 > 10 * PIXELS_BOUND
    # A crop around the mask: image and mask are those of the crop.
    crop = {**call, **INPAINTING, "image": input_image(70, 60), "mask_image": input_mask(70, 60)}
    crop["padding_mask_crop"] = 4
    oracle.set_progress_bar_config(disable=True)
    oracle.scheduler = SCHEDULERS["ddim"].from_config(oracle.scheduler.config)
    expected = oracle(generator=torch.Generator().manual_seed(3), **crop).images[0]
    (made,) = pipeline(seed=3, sampler="ddim", safety="off", **crop).images
    difference = np.abs(np.asarray(made).astype(int) - np.asarray(expected.convert("RGB")).astype(int))
    assert difference.max() <= PIXELS_BOUND


@pytest.mark.slow  # an export
def test_an_asymmetric_autoencoder_of_an_inpainting_model(tmp_path: Path) -> None:
    """A UNet of 9 channels."""
    checkpoint = export_asymmetric(tmp_path, "inpainting")
    pipeline = Pipeline.load(tmp_path / "bundle", device="cpu", threads=1)
    oracle = oracle_of(checkpoint, StableDiffusionInpaintPipeline)
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "guidance_scale": 7.5, **INPAINTING}
    for sampler, count in (("ddim", 1), ("dpmpp_2m", 2)):
        compare(pipeline, oracle, sampler, count, {**call, "strength": 1.0})


@pytest.mark.slow  # an export
@pytest.mark.parametrize("family", ["sd1"])
def test_another_autoencoder_is_used_as_diffusers_uses_it(tmp_path: Path, family: Family) -> None:
    folder = make_checkpoint(tmp_path / "checkpoint", family, safety="none", text_layers=1)
    torch.manual_seed(8)
    other = autoencoder(levels=3, scale=0.4)
    move_off_initial_values(other)
    other.save_pretrained(tmp_path / "other")
    export_checkpoint(folder, tmp_path / "bundle", given=GivenComponents(vae=tmp_path / "other"), progress=Silent())
    pipeline = Pipeline.load(tmp_path / "bundle", device="cpu", threads=1)
    oracle = StableDiffusionPipeline.from_pretrained(folder, vae=other, safety_checker=None)
    call = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 7.5, **SIZE}
    compare(pipeline, oracle, "ddim", 1, call)

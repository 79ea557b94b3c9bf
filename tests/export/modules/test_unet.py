"""The calibration of the denoiser, at the size at which a bundle makes images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from latentrt.bundle.tensors import sized
from latentrt_export.modules.module import Arrays
from latentrt_export.modules.unet import GuidanceDistilledXLUNet, UNet, XLUNet
from latentrt_export.quantize.options import QuantizationOptions
from tests.tiny import PIPELINES, TEXT_WIDTH, Task, move_off_initial_values, unet
from tests.tiny_xl import POOLED_WIDTH, TEXT_WIDTH_2, Kind, xl_unet


@pytest.mark.parametrize("task", ["text-to-image", "inpainting"])
def test_calibration_is_at_the_size_of_images_and_not_at_the_models_own(task: Task) -> None:
    channels = PIPELINES[task][1]
    module = UNet(unet("sd1", channels))
    assert module.model.config.sample_size == 8
    gate_inputs: Arrays = {
        "encoder_hidden_states": np.zeros((2, 77, TEXT_WIDTH), np.float32),
        "latents": np.ones((1, 4, 8, 8), np.float32),
        "noise_schedule": np.array(json.dumps({"beta_schedule": "scaled_linear"})),
        "latent_size": np.array([10, 12]),
    }
    shapes: list[tuple[int, ...]] = []

    def run(feeds: Arrays) -> Arrays:
        shapes.append(feeds["sample"].shape)
        return {"noise_pred": np.zeros_like(feeds["sample"][:, :4])}

    produced = module.calibrate(run, gate_inputs, QuantizationOptions(steps=2, guidance_scale=3.0))
    assert shapes == [(2, channels, 10, 12)] * 2
    assert produced["denoised"].shape == (1, 4, 10, 12)


def make_feeds(module: UNet, seed: int = 0) -> Arrays:
    """Return inputs of two evaluations, with sizes in pixels."""
    rng = np.random.default_rng(seed)
    sizes = {"evaluations": 2, "height": 9, "width": 12, "tokens": 77}
    feeds: Arrays = {spec.name: rng.standard_normal(sized(spec, sizes)).astype(np.float32) for spec in module.inputs}
    feeds["timestep"] = np.array([801, 21], np.float32)
    feeds["time_ids"] = np.array([[1023, 768, 0, 64, 1024, 832], [512, 512, 3, 0, 1000, 6]], np.float32)
    feeds["time_ids"] = feeds["time_ids"][:, : module.inputs[4].shape[1]]
    return feeds


@pytest.mark.parametrize("kind", ["base", "refiner", "inpainting"])
def test_the_denoiser_of_xl_takes_a_pooled_text_and_sizes(kind: Kind) -> None:
    torch.manual_seed(0)
    model, ids = xl_unet(kind), 5 if kind == "refiner" else 6
    move_off_initial_values(model)
    module = XLUNet(model, POOLED_WIDTH)
    assert [(spec.name, *spec.shape[1:]) for spec in module.inputs[3:]] == [("text_embeds", 40), ("time_ids", ids)]
    feeds = make_feeds(module)
    found = module.torch_outputs(feeds)["noise_pred"]
    own = xl_unet(kind)
    own.load_state_dict(model.state_dict())
    sample, timestep, text, pooled, sizes = map(torch.from_numpy, feeds.values())
    added = {"text_embeds": pooled, "time_ids": sizes}
    with torch.inference_mode():
        expected = own(sample, timestep, text, added_cond_kwargs=added, return_dict=False)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    for name in ("text_embeds", "time_ids"):
        other = module.torch_outputs({**feeds, name: feeds[name][::-1].copy()})["noise_pred"]
        assert not np.allclose(other, found), name


def test_distilled_guidance_of_xl_is_that_of_diffusers() -> None:
    torch.manual_seed(0)
    model = xl_unet("distilled")
    move_off_initial_values(model)
    own = xl_unet("distilled")
    own.load_state_dict(model.state_dict())
    module = GuidanceDistilledXLUNet(model, POOLED_WIDTH)
    assert module.inputs[-1].name == "guidance_weight"
    feeds = {**make_feeds(module), "guidance_weight": np.array([6.5, 0], np.float32)}
    weights = torch.from_numpy(feeds["guidance_weight"])
    embed = StableDiffusionXLPipeline.get_guidance_scale_embedding
    condition = embed(None, weights, embedding_dim=16)
    sample, timestep, text, pooled, sizes, _ = map(torch.from_numpy, feeds.values())
    with torch.inference_mode():
        expected = own(
            sample,
            timestep,
            text,
            timestep_cond=condition,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes},
            return_dict=False,
        )[0].numpy()
    found = module.torch_outputs(feeds)["noise_pred"]
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("kind", ["base", "refiner"])
def test_calibration_of_xl_conditions_as_a_request_does(kind: Kind, zeros: bool) -> None:
    module = XLUNet(xl_unet(kind), POOLED_WIDTH)
    width = TEXT_WIDTH_2 + (TEXT_WIDTH if kind == "base" else 0)
    gate_inputs: Arrays = {
        "encoder_hidden_states": np.ones((3, 77, width), np.float32),
        "text_embeds": np.full((3, POOLED_WIDTH), 2, np.float32),
        "time_ids": np.array([80, 96, 0, 0, 80, 96], np.float32),
        "latents": np.ones((1, 4, 8, 8), np.float32),
        "noise_schedule": np.array(json.dumps({"beta_schedule": "scaled_linear"})),
        "latent_size": np.array([10, 12]),
    }
    feeds: list[Arrays] = []

    def run(each: Arrays) -> Arrays:
        assert all(array.flags.writeable for array in each.values()), "torch warns of others"
        feeds.append(each)
        return {"noise_pred": np.zeros_like(each["sample"])}

    options = QuantizationOptions(steps=1, guidance_scale=3.0, force_zeros_for_empty_prompt=zeros)
    produced = module.calibrate(run, gate_inputs, options)
    assert produced["denoised"].shape == (2, 4, 10, 12)
    assert len(feeds) == 2
    for each in feeds:
        assert {*each} == {spec.name for spec in module.inputs}
        rows = {tuple(row) for row in each["time_ids"].tolist()}
        sizes = (80.0, 96.0, 0.0, 0.0)
        assert rows == ({(*sizes, 6.0), (*sizes, 2.5)} if kind == "refiner" else {(*sizes, 80.0, 96.0)})
        values = {float(row.max()) for row in each["text_embeds"]}
        assert values == ({0.0, 2.0} if zeros else {2.0})
        texts = {float(row.max()) for row in each["encoder_hidden_states"]}
        assert texts == ({0.0, 1.0} if zeros else {1.0})

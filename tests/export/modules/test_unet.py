"""The calibration of the denoiser, at the size at which a bundle makes images."""

from __future__ import annotations

import json

import numpy as np
import pytest

from latentrt_export.modules.module import Arrays
from latentrt_export.modules.unet import UNet
from latentrt_export.quantize.options import QuantizationOptions
from tests.tiny import PIPELINES, TEXT_WIDTH, Task, unet


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

"""Denoises the calibration prompts in torch, as the runtime would."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.guidance import guide
from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers.euler import Euler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Latents, Schedule, denoise
from latentrt_export.modules.module import Arrays
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["denoise_prompts"]


# From the highest noise level to the lowest, so that no later run has values outside of the calibrated ranges.
_FULL_RANGE = {"timestep_spacing": "linspace"}


def denoise_prompts(
    run: Callable[[Arrays], Arrays],
    gate_inputs: Mapping[str, NDArray[Any]],
    shape: tuple[int, ...],
    options: QuantizationOptions,
) -> NDArray[np.float32]:
    """Denoise each calibration prompt with Euler's method, from the noise of a seed of its own.

    Args:
        run: evaluates the denoiser.
        gate_inputs: `calibration_embeddings`, float32 [1 + prompts, 77, width], of which the first row is the empty
            prompt's; and `noise_schedule`, the training noise schedule and the prediction type as JSON.
        shape: of latents, (channels, height, width).
        options: the number of steps and the guidance scale.

    Returns:
        The last latents of each prompt, float32 [prompts, *shape].
    """
    config = {**json.loads(str(gate_inputs["noise_schedule"])), **_FULL_RANGE}
    schedule = Euler.read(config).table(Steps(count=options.steps))
    empty, *prompts = gate_inputs["calibration_embeddings"]
    return np.stack(
        [
            _denoise(run, schedule, np.stack([empty, prompt]), Generator(seed).normal(shape)[np.newaxis], options)[0]
            for seed, prompt in enumerate(prompts)
        ]
    )


def _denoise(
    run: Callable[[Arrays], Arrays],
    schedule: Schedule,
    embeddings: NDArray[np.float32],
    noise: Latents,
    options: QuantizationOptions,
) -> Latents:
    def model(timestep: np.float32, sample: Latents) -> Latents:
        feeds = {
            "sample": np.concatenate([sample, sample]),  # (2, C, H, W): the empty prompt's half first
            "timestep": np.full(2, timestep, np.float32),
            "encoder_hidden_states": embeddings,
        }
        predicted: Latents = run(feeds)["noise_pred"]
        # A scale of at most 1 means no guidance, as in the runtime: the prompt's half alone.
        return guide(predicted, options.guidance_scale, 0.0) if options.guidance_scale > 1 else predicted[1:]

    *_, last = denoise(schedule, schedule.first_latents(noise), model, noise=lambda: noise)
    return last

"""Runs of a denoiser in torch, as the runtime would do them, to calibrate it on."""

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
from latentrt_export.quantize.quantization_options import Quantizing

__all__ = ["denoised"]


# From the noisiest level to the cleanest one, so that no run meets values beyond those that calibration met.
_WHOLE = {"timestep_spacing": "linspace"}


def denoised(
    run: Callable[[Arrays], Arrays],
    known: Mapping[str, NDArray[Any]],
    shape: tuple[int, ...],
    quantizing: Quantizing,
) -> NDArray[np.float32]:
    """Denoise each of the calibration's prompts with Euler's method, from the noise of a seed of its own.

    Args:
        run: the denoiser.
        known: `calibration_embeddings`, float32 [1 + prompts, 77, width], the empty prompt's first, and
            `noise_schedule`, the training noise schedule and the prediction type as JSON.
        shape: of latents, (channels, height, width).
        quantizing: how many steps, and how strongly guided.

    Returns:
        The last latents of each, float32 [prompts, *shape].
    """
    schedule = Euler.read({**json.loads(str(known["noise_schedule"])), **_WHOLE}).table(Steps(count=quantizing.steps))
    empty, *prompts = known["calibration_embeddings"]
    return np.stack(
        [
            _one(run, schedule, np.stack([empty, prompt]), Generator(seed).normal(shape)[np.newaxis], quantizing)[0]
            for seed, prompt in enumerate(prompts)
        ]
    )


def _one(
    run: Callable[[Arrays], Arrays],
    schedule: Schedule,
    embeddings: NDArray[np.float32],
    noise: Latents,
    quantizing: Quantizing,
) -> Latents:
    def model(timestep: np.float32, sample: Latents) -> Latents:
        feeds = {
            "sample": np.concatenate([sample, sample]),  # (2, C, h, w): the empty prompt's half first
            "timestep": np.full(2, timestep, np.float32),
            "encoder_hidden_states": embeddings,
        }
        predicted: Latents = run(feeds)["noise_pred"]
        # At most 1 is no guidance, as in a run: the prompt's half alone.
        return guide(predicted, quantizing.guidance_scale, 0.0) if quantizing.guidance_scale > 1 else predicted[1:]

    *_, last = denoise(schedule, schedule.first_latents(noise), model, noise=lambda: noise)
    return last

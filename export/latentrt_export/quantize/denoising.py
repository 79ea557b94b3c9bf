"""Runs of a denoiser in torch, as the runtime does them, to calibrate it on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Session
from latentrt.bundle.tensors import TensorSpec
from latentrt.sampling.denoiser import Conditioning, WholeDenoiser
from latentrt.sampling.guidance import ClassifierFree, Guidance, Unguided
from latentrt.sampling.loop import Sample, step
from latentrt.sampling.noise import Generator
from latentrt.sampling.samplers.euler import Euler
from latentrt.sampling.samplers.steps import Steps
from latentrt_export.modules.module import Arrays
from latentrt_export.quantize.quantization_options import Quantizing

__all__ = ["denoise_prompts"]


# From the noisiest level to the cleanest one, so that no run meets values beyond those that calibration met.
_WHOLE = {"timestep_spacing": "linspace"}


class _TorchSession(Session):
    """The torch module that is calibrated, as a session."""

    def __init__(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], evaluate: Callable[[Arrays], Arrays]
    ) -> None:
        self.inputs, self.outputs, self._evaluate = inputs, outputs, evaluate

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return self._evaluate(dict(feeds))


def denoise_prompts(
    run: Callable[[Arrays], Arrays],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    text: str,
    known: Mapping[str, NDArray[Any]],
    shape: tuple[int, ...],
    quantizing: Quantizing,
) -> NDArray[np.float32]:
    """Denoise each of the calibration's prompts with Euler's method, from the noise of a seed of its own.

    Args:
        run: evaluates the denoiser, whose signature is `inputs` and `outputs`.
        text: the denoiser's input of text embeddings.
        known: `calibration_embeddings`, float32 [1 + prompts, 77, width], the empty prompt's first, and
            `noise_schedule`, the training noise schedule and the prediction type as JSON.
        shape: of latents, (C, H, W).
        quantizing: steps and guidance scale.

    Returns:
        The last latents of each, float32 [prompts, C, H, W].
    """
    schedule = Euler.read({**json.loads(str(known["noise_schedule"])), **_WHOLE}).table(Steps(count=quantizing.steps))
    empty, *prompts = known["calibration_embeddings"]
    scale = quantizing.guidance_scale
    guidance: Guidance = ClassifierFree(scale=scale) if scale > 1 else Unguided()
    session = _TorchSession(inputs, outputs, run)
    denoiser = WholeDenoiser(session, latents="sample", timestep="timestep", output="noise_pred")
    last = []
    for seed, prompt in enumerate(prompts):
        sides = {"negative": Conditioning({text: empty}), "positive": Conditioning({text: prompt})}
        sample = Sample(schedule, schedule.first_latents(Generator(seed).normal(shape)), sides, guidance)
        while not sample.done:
            step([sample], denoiser)
        last.append(sample.latents)
    return np.stack(last)

"""Denoises the calibration prompts in torch with the runtime's own sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["denoise_prompts"]


# From the highest noise level to the lowest, so that no later run has values outside of the calibrated ranges.
_FULL_RANGE = {"timestep_spacing": "linspace"}


class _TorchSession(Session):
    """A torch module under calibration."""

    def __init__(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], evaluate: Callable[[Arrays], Arrays]
    ) -> None:
        self.inputs, self.outputs, self._evaluate = inputs, outputs, evaluate

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        # A loop's stacked inputs are read-only, of which torch warns.
        return self._evaluate({name: np.require(array, requirements="W") for name, array in feeds.items()})


def denoise_prompts(
    run: Callable[[Arrays], Arrays],
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    conditionings: Sequence[Arrays],
    noise_schedule: Mapping[str, Any],
    shape: tuple[int, ...],
    options: QuantizationOptions,
) -> NDArray[np.float32]:
    """Denoise each calibration prompt with Euler's method; each starts from noise of its own seed.

    Args:
        run: evaluates the denoiser, which has the signature `inputs` and `outputs`.
        conditionings: the inputs beside latents and timestep, without a batch axis: those of the empty prompt, then
            those of each prompt.
        noise_schedule: the training noise schedule and the prediction type, keys of a scheduler's configuration.
        shape: the shape of the latents, (C, H, W).
        options: the number of steps and the guidance scale.

    Returns:
        The last latents of each prompt, float32 [prompts, C, H, W].
    """
    schedule = Euler.read({**noise_schedule, **_FULL_RANGE}).table(Steps(count=options.steps))
    empty, *prompts = conditionings
    scale = options.guidance_scale
    assert scale is not None, "filled in by `export_checkpoint`"
    guidance: Guidance = ClassifierFree(scale=scale) if scale > 1 else Unguided()
    session = _TorchSession(inputs, outputs, run)
    denoiser = WholeDenoiser(session, latents="sample", timestep="timestep", output="noise_pred")
    last = []
    for seed, prompt in enumerate(prompts):
        sides = {"negative": Conditioning(empty), "positive": Conditioning(prompt)}
        sample = Sample(schedule, schedule.first_latents(Generator(seed).normal(shape)), sides, guidance)
        while not sample.done:
            step([sample], denoiser)
        last.append(sample.latents)
    return np.stack(last)

"""The reverse VE SDE, predictor and corrector (Song et al. 2021, https://arxiv.org/abs/2011.13456, algorithm 2).

The predictor is a table. The corrector is not: its step size depends on the norms of the score and of the noise. It is
`langevin`, to be run `correct_steps` times before each row, with the score at the row's timestep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling.samplers.options import Kind, PositiveFloat, PositiveInt, Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Latents, Schedule
from latentrt.sampling.sigmas import check_sigma_range, linspace_float32

__all__ = ["ScoreSdeVe", "langevin"]


@dataclass(frozen=True, kw_only=True)
class ScoreSdeVe(Sampler):
    """x' = x + (σ² − σ'²)·score + √(σ² − σ'²)·z: reverse diffusion (appendix E)."""

    title: ClassVar[str] = "Reverse VE SDE (Song et al. 2021); the Langevin corrector is not in the table"
    class_name: ClassVar[str] = "ScoreSdeVeScheduler"
    kind: ClassVar[Kind] = "score"
    unsupported_reason: ClassVar[str] = (
        "its corrector depends on norms; run latentrt.sampling.samplers.sde_ve.langevin before each row"
    )
    without_effect: ClassVar[Mapping[str, str]] = {
        "num_train_timesteps": "sigmas follow from the number of steps",
        **dict.fromkeys(("snr", "correct_steps"), "of the corrector, `langevin`"),
    }

    num_train_timesteps: PositiveInt = 2000
    snr: PositiveFloat = 0.15
    sigma_min: PositiveFloat = 0.01
    sigma_max: PositiveFloat = 1348.0
    sampling_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-5
    correct_steps: Annotated[int, msgspec.Meta(ge=0)] = 1

    def table(self, steps: Steps) -> Schedule:
        check_sigma_range(self.sigma_min, self.sigma_max)
        t = linspace_float32(1, self.sampling_eps, steps.count)
        index = (t * np.float32(steps.count - 1)).astype(np.int64)  # truncated in float32, as in diffusers
        ends = np.log(self.sigma_min), np.log(self.sigma_max)
        sigmas = np.exp(linspace_float32(*ends, steps.count).astype(np.float64)).astype(np.float32).astype(np.float64)
        sigma = sigmas[index]
        sigma_next = np.where(index > 0, sigmas[index - 1], 0.0)
        variance = (sigma**2 - sigma_next**2)[steps.begin :]
        return Schedule.of(
            t=t[steps.begin :],
            p=0.0,
            q=1.0,
            a=1.0,
            b=variance[:, np.newaxis],
            s=np.sqrt(variance),
            noise_draws=1,
            alpha=1.0,
            sigma=sigma[steps.begin :],
            init_noise_sigma=self.sigma_max,
        )

    def evaluations(self, count: int) -> int:
        return count * (1 + self.correct_steps)


def langevin(score: Latents, latents: Latents, noise: Latents, snr: float) -> Latents:
    """Return the latents after one step of Langevin dynamics (algorithm 4).

    Args:
        score: the model output for the latents, float32 [batch, …].
        latents: of the same shape.
        noise: standard normal, of the same shape.
        snr: the signal-to-noise ratio r, which sets the step size.

    Raises:
        RequestError: the score is zero, so the step size is undefined.
    """
    score_norm, noise_norm = (
        float(np.linalg.norm(each.reshape(len(each), -1).astype(np.float64), axis=1).mean()) for each in (score, noise)
    )
    if not score_norm:
        raise RequestError("the model returned a score of zero, with which the Langevin step size is undefined")
    step = 2 * (snr * noise_norm / score_norm) ** 2
    corrected: Latents = latents + np.float32(step) * score + np.float32(np.sqrt(2 * step)) * noise
    return corrected

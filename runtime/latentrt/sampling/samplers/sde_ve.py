"""The reverse VE SDE, predictor and corrector (Song et al. 2021, https://arxiv.org/abs/2011.13456, algorithm 2).

The predictor is a table. The corrector is not: how far it goes depends on the norms of the score and of the noise. It
stands here beside it, `langevin`, to be done before each row with the score at the row's timestep, `correct_steps`
times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling.samplers.options import Kind, PositiveFloat, PositiveInt, Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Latents, Schedule
from latentrt.sampling.sigmas import check_ends, linspace_float32

__all__ = ["ScoreSdeVe", "langevin"]


@dataclass(frozen=True, kw_only=True)
class ScoreSdeVe(Sampler):
    """x' = x + (σ² − σ'²)·score + √(σ² − σ'²)·z: reverse diffusion (appendix E)."""

    title: ClassVar[str] = "Reverse VE SDE (Song et al. 2021); a Langevin corrector beside the table"
    class_name: ClassVar[str] = "ScoreSdeVeScheduler"
    kind: ClassVar[Kind] = "score"
    exception: ClassVar[str] = (
        "its corrector depends on norms; `latentrt.sampling.samplers.sde_ve.langevin` does it before a row"
    )

    num_train_timesteps: PositiveInt = 2000
    snr: PositiveFloat = 0.15
    sigma_min: PositiveFloat = 0.01
    sigma_max: PositiveFloat = 1348.0
    sampling_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-5
    correct_steps: Annotated[int, msgspec.Meta(ge=0)] = 1

    def table(self, steps: Steps) -> Schedule:
        check_ends(self.sigma_min, self.sigma_max)
        told = linspace_float32(1, self.sampling_eps, steps.count)
        index = (told * np.float32(steps.count - 1)).astype(np.int64)  # cut off in float32, as diffusers does
        ends = np.log(self.sigma_min), np.log(self.sigma_max)
        levels = np.exp(linspace_float32(*ends, steps.count).astype(np.float64)).astype(np.float32).astype(np.float64)
        here = levels[index]
        there = np.where(index > 0, levels[index - 1], 0.0)
        gone = (here**2 - there**2)[steps.begin :]
        return Schedule.of(
            t=told[steps.begin :],
            p=0.0,
            q=1.0,
            a=1.0,
            b=gone[:, np.newaxis],
            s=np.sqrt(gone),
            noise_draws=1,
            alpha=1.0,
            sigma=here[steps.begin :],
            init_noise_sigma=self.sigma_max,
        )

    def evaluations(self, count: int) -> int:
        return count * (1 + self.correct_steps)


def langevin(score: Latents, latents: Latents, noise: Latents, snr: float) -> Latents:
    """One step of Langevin dynamics (algorithm 4): along the score, with noise, as far as `snr` says.

    Args:
        score: the model's output for the latents, float32 [batch, …].
        latents: of the same shape.
        noise: standard normal, of the same shape.
        snr: the ratio r of the norms that is aimed at.

    Raises:
        RequestError: the score is zero, so that nothing says how far to go.
    """
    score_norm, noise_norm = (
        float(np.linalg.norm(each.reshape(len(each), -1).astype(np.float64), axis=1).mean()) for each in (score, noise)
    )
    if not score_norm:
        raise RequestError("found a score of zero, expected one that says where to go; check the model")
    step = 2 * (snr * noise_norm / score_norm) ** 2
    moved: Latents = latents + np.float32(step) * score + np.float32(np.sqrt(2 * step)) * noise
    return moved

"""The reverse VP SDE by the method of Euler and Maruyama (Song et al. 2021, https://arxiv.org/abs/2011.13456)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from latentrt.sampling.samplers.options import Kind, PositiveFloat, PositiveInt, Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import linspace_float32

__all__ = ["ScoreSdeVp"]


@dataclass(frozen=True, kw_only=True)
class ScoreSdeVp(Sampler):
    """dx = (−½β·x − β·score) dt + √β dw, in reverse from t = 1; the model predicts ε, and score = −ε / σ."""

    title: ClassVar[str] = "Reverse VP SDE, Euler-Maruyama (Song et al. 2021); fresh noise at every step"
    class_name: ClassVar[str] = "ScoreSdeVpScheduler"
    kind: ClassVar[Kind] = "score"
    without_effect: ClassVar[Mapping[str, str]] = {"num_train_timesteps": "time is continuous"}

    num_train_timesteps: PositiveInt = 2000
    beta_min: PositiveFloat = 0.1
    beta_max: PositiveFloat = 20.0
    sampling_eps: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-3

    def table(self, steps: Steps) -> Schedule:
        timesteps = linspace_float32(1, self.sampling_eps, steps.count)[steps.begin :]
        t = timesteps.astype(np.float64)
        log_alpha = -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
        sigma = np.sqrt(-np.expm1(2 * log_alpha))
        beta, dt = self.beta_min + t * (self.beta_max - self.beta_min), 1 / steps.count
        return Schedule.of(
            t=timesteps,
            p=0.0,
            q=1.0,
            a=1 + 0.5 * beta * dt,
            b=(-beta * dt / sigma)[:, np.newaxis],
            s=np.sqrt(beta * dt),
            noise_draws=1,
            alpha=np.exp(log_alpha),
            sigma=sigma,
        )

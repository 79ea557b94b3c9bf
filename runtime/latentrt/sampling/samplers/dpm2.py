"""The midpoint method on the probability flow (`sample_dpm_2` of k-diffusion; DPM-Solver-2 of Lu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.sampling.samplers.k_diffusion import TwoStage, midpoint_schedule
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["KDPM2"]


@dataclass(frozen=True, kw_only=True)
class KDPM2(TwoStage):
    """An Euler step to the geometric mean of both σ, then the whole step with dx/dσ found there."""

    title: ClassVar[str] = "DPM2, the midpoint method (k-diffusion), order 2"
    class_name: ClassVar[str] = "KDPM2DiscreteScheduler"

    def table(self, steps: Steps) -> Schedule:
        training = self.training()
        t, sigmas = self.grid(steps, self.timesteps(steps), training, whole=True)
        middle = np.sqrt(sigmas[:-2] * sigmas[1:-1])
        return midpoint_schedule(self, t, sigmas, middle, sigmas[1:-1], 0.0, training)

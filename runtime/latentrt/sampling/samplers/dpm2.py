"""The midpoint method on the probability flow (`sample_dpm_2` of k-diffusion; DPM-Solver-2 of Lu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.sampling.samplers.k_diffusion import TwoStage, midpoint_table
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["KDPM2"]


@dataclass(frozen=True, kw_only=True)
class KDPM2(TwoStage):
    """An Euler step to the geometric mean of both levels, then the whole step along the slope found there."""

    title: ClassVar[str] = "DPM2, the midpoint method (k-diffusion), order 2"
    class_name: ClassVar[str] = "KDPM2DiscreteScheduler"

    def table(self, steps: Steps) -> Schedule:
        training = self.training()
        t, levels = self.grid(steps, self.told(steps), training, whole=True)
        middle = np.sqrt(levels[:-2] * levels[1:-1])
        return midpoint_table(self, t, levels, middle, levels[1:-1], 0.0, training)

"""Ancestral sampling with the midpoint method (`sample_dpm_2_ancestral` of Katherine Crowson's k-diffusion)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.sampling.samplers.k_diffusion import TwoStage, midpoint_table
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["KDPM2Ancestral"]


@dataclass(frozen=True, kw_only=True)
class KDPM2Ancestral(TwoStage):
    """A midpoint step to below the next noise level σ', then fresh noise: σ'² = σ_down² + σ_up², σ_down = σ'² / σ."""

    title: ClassVar[str] = "DPM2 ancestral (k-diffusion); fresh noise at every step"
    class_name: ClassVar[str] = "KDPM2AncestralDiscreteScheduler"

    def table(self, steps: Steps) -> Schedule:
        training = self.training()
        t, levels = self.grid(steps, self.told(steps), training, whole=True)
        here, there = levels[:-2], levels[1:-1]
        down, up = there**2 / here, there * np.sqrt(1 - (there / here) ** 2)
        return midpoint_table(self, t, levels, np.sqrt(here * down), down, up, training)

"""Ancestral sampling with the midpoint method (`sample_dpm_2_ancestral` of Katherine Crowson's k-diffusion)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.sampling.samplers.k_diffusion import TwoStage, midpoint_schedule
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["KDPM2Ancestral"]


@dataclass(frozen=True, kw_only=True)
class KDPM2Ancestral(TwoStage):
    """A midpoint step to σ_down, below the next σ', then fresh noise: σ'² = σ_down² + σ_up², σ_down = σ'² / σ."""

    title: ClassVar[str] = "DPM2 ancestral (k-diffusion); fresh noise at every step"
    class_name: ClassVar[str] = "KDPM2AncestralDiscreteScheduler"

    def table(self, steps: Steps) -> Schedule:
        training = self.training()
        t, sigmas = self.grid(steps, self.timesteps(steps), training, whole=True)
        sigma, sigma_next = sigmas[:-2], sigmas[1:-1]
        down, up = sigma_next**2 / sigma, sigma_next * np.sqrt(1 - (sigma_next / sigma) ** 2)
        return midpoint_schedule(self, t, sigmas, np.sqrt(sigma * down), down, up, training)

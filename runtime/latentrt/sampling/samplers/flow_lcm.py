"""LCM for flow-matching models: a jump to the picture and fresh noise on it, step after step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.sampling.samplers.flow import RespacedFlow
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["FlowLCM"]


@dataclass(frozen=True, kw_only=True)
class FlowLCM(RespacedFlow):
    """x' = (1 − σ')·x0 + σ'·z with x0 = x − σ·m. Pictures that grow between steps (`scale_factors`) are no table."""

    title: ClassVar[str] = "LCM for flow-matching models distilled to a few steps"
    class_name: ClassVar[str] = "FlowMatchLCMScheduler"

    scale_factors: None = None
    upscale_mode: str | None = "bicubic"

    def table(self, steps: Steps) -> Schedule:
        t, levels = self.grid(steps)
        sigma, following = levels[:-1], levels[1:]
        return Schedule.of(
            t=t,
            p=1.0,
            q=-sigma,
            a=0.0,
            b=(1 - following)[:, np.newaxis],
            s=following,
            noise_draws=1,
            alpha=1 - sigma,
            sigma=sigma,
        )

"""LCM for flow-matching models: every step predicts the image and adds fresh noise to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.sampling.samplers.flow import SpacedFlow
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["FlowLCM"]


@dataclass(frozen=True, kw_only=True)
class FlowLCM(SpacedFlow):
    """x' = (1 − σ')·x0 + σ'·z with x0 = x − σ·m. `scale_factors`, with which latents grow, are not supported."""

    title: ClassVar[str] = "LCM for flow-matching models distilled to a few steps"
    class_name: ClassVar[str] = "FlowMatchLCMScheduler"
    without_effect: ClassVar[Mapping[str, str]] = {
        **SpacedFlow.without_effect,
        "upscale_mode": "of `scale_factors`, which are refused",
    }

    scale_factors: None = None
    upscale_mode: str | None = "bicubic"

    def table(self, steps: Steps) -> Schedule:
        t, sigmas = self.grid(steps)
        sigma, sigma_next = sigmas[:-1], sigmas[1:]
        return Schedule.of(
            t=t,
            p=1.0,
            q=-sigma,
            a=0.0,
            b=(1 - sigma_next)[:, np.newaxis],
            s=sigma_next,
            noise_draws=1,
            alpha=1 - sigma,
            sigma=sigma,
        )

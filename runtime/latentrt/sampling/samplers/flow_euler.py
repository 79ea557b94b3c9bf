"""Euler's method along a flow (Esser et al. 2024, https://arxiv.org/abs/2403.03206, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from latentrt.sampling.samplers.flow import RespacedFlow
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["FlowEuler"]


@dataclass(frozen=True, kw_only=True)
class FlowEuler(RespacedFlow):
    """x' = x + (σ' − σ)·m; with `stochastic_sampling` a jump to the picture and fresh noise on it."""

    title: ClassVar[str] = "Euler for flow-matching models (Esser et al. 2024)"
    class_name: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"

    stochastic_sampling: bool = False

    def table(self, steps: Steps) -> Schedule:
        t, levels = self.grid(steps)
        sigma, following = levels[:-1], levels[1:]
        rows: dict[str, Any]
        if self.stochastic_sampling:
            # y = x0.
            rows = {"p": 1.0, "q": -sigma, "a": 0.0, "b": (1 - following)[:, np.newaxis], "s": following}
        else:
            rows = {"p": 0.0, "q": 1.0, "a": 1.0, "b": np.diff(levels)[:, np.newaxis]}
        return Schedule.of(t=t, **rows, noise_draws=int(self.stochastic_sampling), alpha=1 - sigma, sigma=sigma)

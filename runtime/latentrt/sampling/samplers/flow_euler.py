"""Euler's method along a flow (Esser et al. 2024, https://arxiv.org/abs/2403.03206, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from latentrt.sampling.samplers.flow import SpacedFlow
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["FlowEuler"]


@dataclass(frozen=True, kw_only=True)
class FlowEuler(SpacedFlow):
    """x' = x + (σ' − σ)·m; with `stochastic_sampling` x' = (1 − σ')·x0 + σ'·z instead."""

    title: ClassVar[str] = "Euler for flow-matching models (Esser et al. 2024)"
    class_name: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"

    stochastic_sampling: bool = False

    def table(self, steps: Steps) -> Schedule:
        t, sigmas = self.grid(steps)
        sigma, sigma_next = sigmas[:-1], sigmas[1:]
        columns: dict[str, Any]
        if self.stochastic_sampling:  # the history is x0
            columns = {"p": 1.0, "q": -sigma, "a": 0.0, "b": (1 - sigma_next)[:, np.newaxis], "s": sigma_next}
        else:
            columns = {"p": 0.0, "q": 1.0, "a": 1.0, "b": np.diff(sigmas)[:, np.newaxis]}
        return Schedule.of(t=t, **columns, noise_draws=int(self.stochastic_sampling), alpha=1 - sigma, sigma=sigma)

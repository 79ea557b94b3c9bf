"""Heun's method along a flow (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 2, in a flow's σ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.sampling import sigmas
from latentrt.sampling.samplers.flow import Flow
from latentrt.sampling.samplers.k_diffusion import churned, interleaved
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["FlowHeun"]


@dataclass(frozen=True, kw_only=True)
class FlowHeun(Flow):
    """An Euler step, then half the difference of both slopes is added to it."""

    title: ClassVar[str] = "Heun for flow-matching models, order 2"
    class_name: ClassVar[str] = "FlowMatchHeunDiscreteScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"s_churn", "s_tmin", "s_tmax", "s_noise"})

    def table(self, steps: Steps) -> Schedule:
        grid = sigmas.shifted(self.spread(steps), self.shift).astype(np.float32)
        levels = np.append(grid, np.float32(0)).astype(np.float64)[steps.begin :]
        t = (grid * np.float32(self.num_train_timesteps)).astype(np.float64)[steps.begin :]
        # diffusers divides s_churn by the number of its levels, of which there are two in each step but the last.
        raised = churned(levels[:-1], steps, self.evaluations(steps.count))
        step = levels[1:] - raised
        slope = step * levels[:-1] / raised  # as the model's output is read with the level before the noise
        none = np.zeros(len(t))
        draws = (raised > levels[:-1]).astype(np.float64)
        return Schedule.of(
            t=interleaved(t, t[1:]),
            p=0.0,
            q=1.0,
            a=1.0,
            b=np.stack([interleaved(slope, step[:-1] / 2), interleaved(none, -slope[:-1] / 2)], axis=1),
            s=interleaved(steps.s_noise * np.sqrt(raised**2 - levels[:-1] ** 2), 0.0),
            noise_draws=interleaved(draws, draws[:-1]).astype(np.int64),  # the second stage's goes unused
            alpha=1 - interleaved(levels[:-1], levels[1:-1]),
            sigma=interleaved(levels[:-1], levels[1:-1]),
        )

    def evaluations(self, count: int) -> int:
        return 2 * count - 1

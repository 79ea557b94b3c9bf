"""Heun's method along a flow (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 2, in a flow's σ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.sampling.samplers.flow import Flow
from latentrt.sampling.samplers.k_diffusion import add_churn, interleave
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import shift_sigmas

__all__ = ["FlowHeun"]


@dataclass(frozen=True, kw_only=True)
class FlowHeun(Flow):
    """An Euler step, and then half the difference of the velocities at both its ends."""

    title: ClassVar[str] = "Heun for flow-matching models, order 2"
    class_name: ClassVar[str] = "FlowMatchHeunDiscreteScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"s_churn", "s_tmin", "s_tmax", "s_noise"})

    def table(self, steps: Steps) -> Schedule:
        grid = shift_sigmas(self.space(steps), self.shift).astype(np.float32)
        sigmas = np.append(grid, np.float32(0)).astype(np.float64)[steps.begin :]
        t = (grid * np.float32(self.num_train_timesteps)).astype(np.float64)[steps.begin :]
        # diffusers divides s_churn by the number of its sigmas, of which there are two per step but the last.
        sigma_hat = add_churn(sigmas[:-1], steps, self.evaluations(steps.count))
        step = sigmas[1:] - sigma_hat
        slope = step * sigmas[:-1] / sigma_hat  # diffusers converts the model output with σ before the noise
        none = np.zeros(len(t))
        draws = (sigma_hat > sigmas[:-1]).astype(np.float64)
        sigma = interleave(sigmas[:-1], sigmas[1:-1])
        return Schedule.of(
            t=interleave(t, t[1:]),
            p=0.0,
            q=1.0,
            a=1.0,
            b=np.stack([interleave(slope, step[:-1] / 2), interleave(none, -slope[:-1] / 2)], axis=1),
            s=interleave(steps.s_noise * np.sqrt(sigma_hat**2 - sigmas[:-1] ** 2), 0.0),
            noise_draws=interleave(draws, draws[:-1]).astype(np.int64),  # that of the second stage is unused
            alpha=1 - sigma,
            sigma=sigma,
        )

    def evaluations(self, count: int) -> int:
        return 2 * count - 1

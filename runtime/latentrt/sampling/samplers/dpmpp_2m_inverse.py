"""DPM-Solver multistep from an image to its noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.samplers.dpmpp_2m import multistep_schedule
from latentrt.sampling.samplers.log_snr import FixedVariance, LogSNR, count_usable_timesteps, step_orders
from latentrt.sampling.samplers.options import StepsOffset
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import TimestepSpacing, training_sigmas

__all__ = ["DPMSolverMultistepInverse"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepInverse(LogSNR):
    """The steps of DPM-Solver from less noise to more. Noise cannot be removed, so there is no SDE variant."""

    title: ClassVar[str] = "DPM-Solver++ multistep inverse, from an image to its noise"
    class_name: ClassVar[str] = "DPMSolverMultistepInverseScheduler"
    without_effect: ClassVar[Mapping[str, str]] = {
        "variance_type": "a fixed variance is that of the sampler; a learned one is refused",
    }
    inverse: ClassVar[bool] = True

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -np.inf
    variance_type: FixedVariance | None = None
    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: StepsOffset = 0

    def table(self, steps: Steps) -> Schedule:
        t, sigmas = self._grid(steps, training_sigmas(self.alphas_cumprod()))
        # As in diffusers, equal timesteps are merged; σ are not rounded and stay.
        t = steps.skip(t[np.sort(np.unique(t, return_index=True)[1])]).astype(np.int64)
        order = step_orders(
            steps,
            len(t),
            self.solver_order,
            lower_final=self.lower_order_final,
            first_at_end=self.euler_at_final,
        )
        return multistep_schedule(self, t, self.noise_grid(sigmas[steps.begin :][: len(t) + 1]), order)

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[Float64s, Float64s]:
        """Return ascending timesteps [N], and σ at each of them and after the last [N + 1]."""
        usable = count_usable_timesteps(training, self.lambda_min_clipped)
        spaced = self.space_sigmas(steps, training, ascending=True)
        if spaced is not None:
            return spaced[0], np.append(spaced[1], spaced[1][-1])
        if self.timestep_spacing == "trailing":
            t = self.space_timesteps(steps, "trailing", 0, usable)[::-1]
        else:
            # From 0 on, without the last of a grid with one more.
            t = np.append(0.0, self.space_timesteps(steps, self.timestep_spacing, 0, usable)[:0:-1])
            t = t + (self.steps_offset if self.timestep_spacing == "leading" else 0)
        sigmas = np.interp(t, np.arange(len(training)), training)
        return t, np.append(sigmas, training[usable - 1])

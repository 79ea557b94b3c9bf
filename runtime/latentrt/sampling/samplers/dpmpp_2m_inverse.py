"""DPM-Solver multistep backwards: from a picture to the noise that it is drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling import sigmas
from latentrt.sampling.samplers.dpmpp_2m import columns
from latentrt.sampling.samplers.log_snr import FixedVariance, LogSNR, orders, usable_timesteps
from latentrt.sampling.samplers.options import StepsOffset
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["DPMSolverMultistepInverse"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistepInverse(LogSNR):
    """The steps of DPM-Solver from less noise to more. Noise cannot be taken out, so there is no SDE variant."""

    title: ClassVar[str] = "DPM-Solver++ multistep backwards, from a picture to its noise"
    class_name: ClassVar[str] = "DPMSolverMultistepInverseScheduler"
    backwards: ClassVar[bool] = True

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    lambda_min_clipped: float = -np.inf
    variance_type: FixedVariance | None = None
    timestep_spacing: sigmas.Spacing = "linspace"
    steps_offset: StepsOffset = 0

    def table(self, steps: Steps) -> Schedule:
        t, grid = self._grid(steps, sigmas.sigmas(self.alphas_cumprod()))
        # Timesteps that are equal count once, as in diffusers; levels are not rounded and stay.
        t = steps.rest(t[np.sort(np.unique(t, return_index=True)[1])]).astype(np.int64)
        levels = self.levels(grid[steps.begin :][: len(t) + 1])
        order = orders(
            steps,
            len(t),
            self.solver_order,
            lower_final=self.lower_order_final,
            first_at_end=self.euler_at_final,
        )
        return columns(self, t, levels, order)

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[Float64s, Float64s]:
        """Timesteps ascending [N], and σ at each of them and after the last [N + 1]."""
        usable = usable_timesteps(training, self.lambda_min_clipped)
        found = self.respaced(steps, training, ascending=True)
        if found is not None:
            return found[0], np.append(found[1], found[1][-1])
        if self.timestep_spacing == "trailing":
            t = self.whole_grid(steps, "trailing", 0, usable)[::-1]
        else:
            # From 0 on, without the last of one more than asked for.
            t = np.append(0.0, self.whole_grid(steps, self.timestep_spacing, 0, usable)[:0:-1])
            t = t + (self.steps_offset if self.timestep_spacing == "leading" else 0)
        levels = np.interp(t, np.arange(len(training)), training)
        return t, np.append(levels, training[usable - 1])

"""DEIS: the diffusion exponential integrator, multistep over log ρ (Zhang and Chen 2022, arXiv:2204.13902)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling import sigmas
from latentrt.sampling.samplers.lagrange import adams_weights
from latentrt.sampling.samplers.log_snr import Levels, LogSNR, check_levels_differ, orders
from latentrt.sampling.samplers.options import StepsOffset
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["DEIS"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DEIS(LogSNR):
    """x_t / α_t = x_s / α_s + ∫ε dρ with ρ = σ / α, and ε a polynomial in log ρ through the last values.

    Algorithm and solver types of other solvers are read as `deis` and `logrho`, as diffusers does.
    """

    title: ClassVar[str] = "DEIS multistep over log rho (Zhang and Chen 2022), order 2 by default"
    class_name: ClassVar[str] = "DEISMultistepScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"mu"})

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["deis", "dpmsolver", "dpmsolver++"] = "deis"
    solver_type: Literal["logrho", "midpoint", "heun", "bh1", "bh2"] = "logrho"
    lower_order_final: bool = True
    timestep_spacing: sigmas.Spacing = "linspace"
    steps_offset: StepsOffset = 0
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def table(self, steps: Steps) -> Schedule:
        t, grid = self._grid(steps, sigmas.sigmas(self.alphas_cumprod()))
        levels = self.levels(grid[steps.begin :])
        t = t[steps.begin :]
        order = orders(steps, len(t), self.solver_order, lower_final=self.lower_order_final, first_at_end=False)
        return Schedule.of(
            t=t,
            **self._remembered(levels),
            a=levels.alpha[1:] / levels.alpha[:-1],
            b=_weights(levels, order),
            alpha=levels.alpha[:-1],
            sigma=levels.sigma[:-1],
        )

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64s]:
        """Timesteps [N], and σ at each of them and after the last [N + 1]."""
        found = self.respaced(steps, training)
        if found is not None:
            return found[0].astype(np.int64), np.append(found[1], found[1][-1])
        t = self.whole_grid(steps, self.timestep_spacing, self.steps_offset, self.num_train_timesteps)
        grid = np.interp(t, np.arange(len(training)), training)
        return t.astype(np.int64), np.append(grid, training[0])

    def _remembered(self, levels: Levels) -> dict[str, Any]:
        """ε, always by way of x0."""
        p, q = self.x0(levels)
        _, alpha, sigma = (column[:-1] for column in levels)
        if self.thresholding:
            return {"p": p, "q": q, **self.bounds(), "u": 1 / sigma, "w": -alpha / sigma}
        if self.prediction_type == "epsilon":
            return {"p": 0.0, "q": 1.0}
        return {"p": (1 - alpha * p) / sigma, "q": -alpha * q / sigma}


def _weights(levels: Levels, order: NDArray[np.int64]) -> Float64s:
    """The weights of ε, newest first, [N, order]."""
    log_rho = -levels.log_snr
    end = log_rho[1:]
    weights = np.zeros((len(order), int(order.max())))
    for degree in range(1, weights.shape[1] + 1):
        rows = np.flatnonzero(order == degree)
        points = np.stack([log_rho[rows - j] for j in range(degree)], axis=1)
        check_levels_differ(differ=bool(np.all(np.diff(points, axis=1) != 0)))
        # ∫ε dρ over log ρ is ∫ε e^(log ρ); α_t·ρ_t = σ_t.
        within = adams_weights(points, log_rho[rows], end[rows], rate=1.0)
        weights[rows, :degree] = levels.sigma[1:][rows, np.newaxis] * within
    return weights

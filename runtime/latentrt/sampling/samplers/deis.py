"""DEIS: the diffusion exponential integrator, multistep over log ρ (Zhang and Chen 2022, arXiv:2204.13902)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.samplers.log_snr import LogSNR, NoiseGrid, check_distinct_sigmas, step_orders
from latentrt.sampling.samplers.multistep import adams_weights
from latentrt.sampling.samplers.options import StepsOffset
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import TimestepSpacing, training_sigmas

__all__ = ["DEIS"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DEIS(LogSNR):
    """x_t / α_t = x_s / α_s + ∫ε dρ with ρ = σ / α, and ε a polynomial in log ρ through the last values.

    As in diffusers, algorithm and solver types of other solvers mean `deis` and `logrho`.
    """

    title: ClassVar[str] = "DEIS multistep over log rho (Zhang and Chen 2022), order 2 by default"
    class_name: ClassVar[str] = "DEISMultistepScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"mu"})
    without_effect: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("algorithm_type", "solver_type"), "those of other solvers mean `deis` and `logrho`"),
        "time_shift_type": "with `use_dynamic_shifting`, another than `exponential` is refused",
    }

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["deis", "dpmsolver", "dpmsolver++"] = "deis"
    solver_type: Literal["logrho", "midpoint", "heun", "bh1", "bh2"] = "logrho"
    lower_order_final: bool = True
    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: StepsOffset = 0
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def table(self, steps: Steps) -> Schedule:
        t, sigmas = self._grid(steps, training_sigmas(self.alphas_cumprod()))
        grid, t = self.noise_grid(sigmas[steps.begin :]), t[steps.begin :]
        order = step_orders(steps, len(t), self.solver_order, lower_final=self.lower_order_final, first_at_end=False)
        return Schedule.of(
            t=t,
            **self._history_columns(grid),
            a=grid.alpha[1:] / grid.alpha[:-1],
            b=_weights(grid, order),
            alpha=grid.alpha[:-1],
            sigma=grid.sigma[:-1],
        )

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64s]:
        """Return timesteps [N], and σ at each of them and after the last [N + 1]."""
        spaced = self.space_sigmas(steps, training)
        if spaced is not None:
            return spaced[0].astype(np.int64), np.append(spaced[1], spaced[1][-1])
        t = self.space_timesteps(steps, self.timestep_spacing, self.steps_offset, self.num_train_timesteps)
        sigmas = np.interp(t, np.arange(len(training)), training)
        return t.astype(np.int64), np.append(sigmas, training[0])

    def _history_columns(self, grid: NoiseGrid) -> dict[str, Any]:
        """Return the columns of a history of ε, which is always computed from x0."""
        p, q = self.x0(grid)
        _, alpha, sigma = grid.before()
        if self.thresholding:
            return {"p": p, "q": q, **self.limits(), "u": 1 / sigma, "w": -alpha / sigma}
        if self.prediction_type == "epsilon":
            return {"p": 0.0, "q": 1.0}
        return {"p": (1 - alpha * p) / sigma, "q": -alpha * q / sigma}


def _weights(grid: NoiseGrid, order: NDArray[np.int64]) -> Float64s:
    """Return the weights of ε, newest first, [N, order]."""
    log_rho = -grid.log_snr
    end = log_rho[1:]
    weights = np.zeros((len(order), int(order.max())))
    for degree in range(1, weights.shape[1] + 1):
        rows = np.flatnonzero(order == degree)
        points = np.stack([log_rho[rows - j] for j in range(degree)], axis=1)
        check_distinct_sigmas(distinct=bool(np.all(np.diff(points, axis=1) != 0)))
        # ∫ε dρ over log ρ is ∫ε e^(log ρ); α_t·ρ_t = σ_t.
        integrals = adams_weights(points, log_rho[rows], end[rows], rate=1.0)
        weights[rows, :degree] = grid.sigma[1:][rows, np.newaxis] * integrals
    return weights

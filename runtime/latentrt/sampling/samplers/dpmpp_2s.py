"""DPM-Solver and DPM-Solver++ singlestep, orders 1 to 3 (Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2).

A group of one, two or three evaluations is a step of that order; each of its stages begins where the first did. Here
each counts as a step of its own, as in diffusers, so n steps are n evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import sigmas
from latentrt.sampling.samplers.dpm_solver import Step, check_final_level, solver_step
from latentrt.sampling.samplers.log_snr import FixedVariance, Levels, LogSNR, check_levels_differ, usable_timesteps
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["DPMSolverSinglestep"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DPMSolverSinglestep(LogSNR):
    """Algorithm and solver types of other solvers are read as `dpmsolver++` and `midpoint`, as diffusers does."""

    title: ClassVar[str] = "DPM-Solver++ singlestep, 2S by default (Lu et al. 2022)"
    class_name: ClassVar[str] = "DPMSolverSinglestepScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"timesteps", "mu"})

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -np.inf
    variance_type: FixedVariance | None = None
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def table(self, steps: Steps) -> Schedule:
        algorithm: Any = "dpmsolver++" if self.algorithm_type == "deis" else self.algorithm_type
        self._check(algorithm)
        training = sigmas.sigmas(self.alphas_cumprod())
        t, grid = self._grid(steps, training)
        final = 0.0 if self.final_sigmas_type == "zero" else training[0]
        levels, t = self.levels(np.append(grid, final)[steps.begin :]), t[steps.begin :]
        order = self._orders(steps)[: len(t)]
        rows = _Rows(self, algorithm, levels, order)
        remembered = self.remembers_x0(levels) if algorithm.endswith("++") else self.remembers_epsilon(levels)
        return Schedule.of(
            t=t,
            **(remembered | rows.mixed),
            a=rows.a,
            e=rows.e,
            b=rows.b,
            s=rows.s,
            noise_draws=int(algorithm.startswith("sde")),
            alpha=levels.alpha[:-1],
            sigma=levels.sigma[:-1],
        )

    def _check(self, algorithm: str) -> None:
        check_final_level(self.algorithm_type, self.final_sigmas_type)
        if algorithm == "dpmsolver" and self.thresholding:
            raise RequestError(
                "found thresholding and algorithm_type 'dpmsolver', expected one of them; set algorithm_type to "
                "'dpmsolver++', or switch thresholding off"
            )

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64s]:
        """Timesteps and σ at each of them, [N]."""
        found = self.respaced(steps, training)
        if found is None:
            t = self.whole_grid(steps, "linspace", 0, usable_timesteps(training, self.lambda_min_clipped))
            found = t, np.interp(t, np.arange(len(training)), training)
        return found[0].astype(np.int64), found[1]

    def _orders(self, steps: Steps) -> list[int]:
        """Which stage of its group each evaluation is."""
        count, most = steps.count, self.solver_order
        whole = list(range(1, most + 1)) * (count // most + 1)
        order = whole[:count]
        even = count % most == 0
        lower = self.lower_order_final or not even or self.final_sigmas_type == "zero"
        if lower and most == 3 and even:
            order[-3:] = [1, 2, 1]
        elif (lower and most == 2 and even) or self.final_sigmas_type == "zero":
            order[-1] = 1
        order = order[steps.begin :]
        # A group whose first stages were left out has the order that it can have.
        return [min(stage, i + 1) for i, stage in enumerate(order)]


class _Rows:
    """The columns a, e, b, s, and where the memory is mixed p, q, u and w.

    The third stage of a group wants the latent of two rows ago. Without noise the latent of one row ago tells it: that
    was A·x + B·y. With noise, what is remembered of the first stage is the mixture of x and y that the third wants.
    """

    def __init__(self, solver: DPMSolverSinglestep, algorithm: Any, levels: Levels, order: list[int]) -> None:
        self._algorithm, self._levels = algorithm, levels
        self._heun = solver.solver_type == "heun"
        count = len(order)
        self.a, self.e, self.s, self.b = (
            np.zeros(count),
            np.zeros(count),
            np.zeros(count),
            np.zeros((count, max(order))),
        )
        u, w = np.zeros(count), np.ones(count)
        noisy = algorithm.startswith("sde")
        for k, stage in enumerate(order):
            first = k - stage + 1
            step, weights = self._stage(first, k)
            self.s[k] = step.noise[0]
            if stage == 1:
                if noisy and order[k : k + 3] == [1, 2, 3]:
                    wanted, of_third = self._stage(k, k + 2)
                    u[k], w[k] = wanted.keep[0], of_third[-1]
                self.a[k], self.b[k, 0] = step.keep[0] - weights[0] * u[k] / w[k], weights[0] / w[k]
            elif stage == 2:
                self.e[k] = step.keep[0] - weights[1] * u[first] / w[first]
                self.b[k, 0], self.b[k, 1] = weights[0], weights[1] / w[first]
            elif noisy:
                self.b[k, :3] = weights[0], weights[1], 1.0
            else:
                before, of_first = self._stage(first, first)
                self.e[k] = step.keep[0] / before.keep[0]
                self.b[k, :3] = weights[0], weights[1], weights[2] - self.e[k] * of_first[0]
        self.mixed = {"u": u, "w": w} if np.any(u) else {}

    def _stage(self, first: int, k: int) -> tuple[Step, Float64s]:
        """The step from row `first` to the level after row k, and the weights of its values, newest first."""
        levels = self._levels
        there = Levels(*(column[k + 1 : k + 2] for column in levels))
        log_snr = levels.log_snr
        h = log_snr[k + 1 : k + 2] - log_snr[first]
        keep_alpha, keep_sigma = (column[k + 1 : k + 2] / column[first] for column in (levels.alpha, levels.sigma))
        step = solver_step(self._algorithm, there, h, keep_alpha, keep_sigma)
        weights = np.zeros(k - first + 1)
        weights[-1] = step.value[0]
        if k == first:
            return step, weights
        inside = log_snr[k:first:-1] - log_snr[first]  # of the values, newest first
        check_levels_differ(differ=bool(np.all(inside) and len(np.unique(inside)) == len(inside)))
        per_step = h[0] / inside
        if k == first + 1:
            slope = (step.slope if self._heun else step.half)[0] * per_step[0]
            return step, weights + slope * np.array([1.0, -1.0])
        newest, older = per_step[0] * np.array([1.0, 0.0, -1.0]), per_step[1] * np.array([0.0, 1.0, -1.0])
        if not self._heun:
            return step, weights + step.slope[0] * newest
        r0, r1 = 1 / per_step
        d1, d2 = (r0 * older - r1 * newest) / (r0 - r1), 2 * (newest - older) / (r0 - r1)
        return step, weights + step.slope[0] * d1 + step.curve[0] * d2

"""DPM-Solver and DPM-Solver++ singlestep, orders 1 to 3 (Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2).

A group of one, two or three evaluations is a step of that order; each of its stages starts from the latents of the
first. Each counts as a step of its own, as in diffusers, so n steps are n evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling.samplers.dpm_solver import Step, check_final_sigma, solver_step
from latentrt.sampling.samplers.log_snr import (
    FixedVariance,
    LogSNR,
    NoiseGrid,
    check_distinct_sigmas,
    count_usable_timesteps,
)
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import training_sigmas

__all__ = ["DPMSolverSinglestep"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DPMSolverSinglestep(LogSNR):
    """As in diffusers, algorithm and solver types of other solvers mean `dpmsolver++` and `midpoint`."""

    title: ClassVar[str] = "DPM-Solver++ singlestep, 2S by default (Lu et al. 2022)"
    class_name: ClassVar[str] = "DPMSolverSinglestepScheduler"
    without_effect: ClassVar[Mapping[str, str]] = {
        "variance_type": "a fixed variance is that of the sampler; a learned one is refused",
        "time_shift_type": "with `use_dynamic_shifting`, another than `exponential` is refused",
    }
    run_options: ClassVar[frozenset[str]] = frozenset({"timesteps", "mu"})

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
        training = training_sigmas(self.alphas_cumprod())
        t, sigmas = self._grid(steps, training)
        final = 0.0 if self.final_sigmas_type == "zero" else training[0]
        grid, t = self.noise_grid(np.append(sigmas, final)[steps.begin :]), t[steps.begin :]
        rows = _Rows(self, algorithm, grid, self._stages(steps)[: len(t)])
        prediction = self.x0_columns(grid) if algorithm.endswith("++") else self.epsilon_columns(grid)
        return Schedule.of(
            t=t,
            **(prediction | rows.history),
            a=rows.a,
            e=rows.e,
            b=rows.b,
            s=rows.s,
            noise_draws=int(algorithm.startswith("sde")),
            alpha=grid.alpha[:-1],
            sigma=grid.sigma[:-1],
        )

    def _check(self, algorithm: str) -> None:
        check_final_sigma(self.algorithm_type, self.final_sigmas_type)
        if algorithm == "dpmsolver" and self.thresholding:
            raise RequestError(
                "got `thresholding` with `algorithm_type` 'dpmsolver', expected one of them; set `algorithm_type` to "
                "'dpmsolver++', or `thresholding` to false"
            )

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64s]:
        """Return timesteps and σ at each of them, [N]."""
        spaced = self.space_sigmas(steps, training)
        if spaced is None:
            usable = count_usable_timesteps(training, self.lambda_min_clipped)
            t = self.space_timesteps(steps, "linspace", 0, usable)
            spaced = t, np.interp(t, np.arange(len(training)), training)
        return spaced[0].astype(np.int64), spaced[1]

    def _stages(self, steps: Steps) -> list[int]:
        """Return which stage of its group each evaluation is, from 1."""
        count, most = steps.count, self.solver_order
        stages = (list(range(1, most + 1)) * (count // most + 1))[:count]
        even = count % most == 0
        lower = self.lower_order_final or not even or self.final_sigmas_type == "zero"
        if lower and most == 3 and even:
            stages[-3:] = [1, 2, 1]
        elif (lower and most == 2 and even) or self.final_sigmas_type == "zero":
            stages[-1] = 1
        stages = stages[steps.begin :]
        # A group without its first stages, which `begin` skips, is of lower order.
        return [min(stage, i + 1) for i, stage in enumerate(stages)]


class _Rows:
    """The columns a, e, b, s, and u and w where the history is a mixture of x and y.

    The third stage of a group starts from the latents of two rows ago. Without noise, those follow from the latents of
    one row ago, which were A·x + B·y. With noise, the history of the first stage is the mixture of x and y that the
    third stage needs.
    """

    def __init__(self, solver: DPMSolverSinglestep, algorithm: Any, grid: NoiseGrid, stages: list[int]) -> None:
        self._algorithm, self._grid = algorithm, grid
        self._heun = solver.solver_type == "heun"
        count = len(stages)
        self.a, self.e, self.s = np.zeros(count), np.zeros(count), np.zeros(count)
        self.b = np.zeros((count, max(stages)))
        u, w = np.zeros(count), np.ones(count)
        sde = algorithm.startswith("sde")
        for k, stage in enumerate(stages):
            first = k - stage + 1
            step, weights = self._stage(first, k)
            self.s[k] = step.noise[0]
            if stage == 1:
                if sde and stages[k : k + 3] == [1, 2, 3]:
                    third, third_weights = self._stage(k, k + 2)
                    u[k], w[k] = third.x[0], third_weights[-1]
                self.a[k], self.b[k, 0] = step.x[0] - weights[0] * u[k] / w[k], weights[0] / w[k]
            elif stage == 2:
                self.e[k] = step.x[0] - weights[1] * u[first] / w[first]
                self.b[k, 0], self.b[k, 1] = weights[0], weights[1] / w[first]
            elif sde:
                self.b[k, :3] = weights[0], weights[1], 1.0
            else:
                before, first_weights = self._stage(first, first)
                self.e[k] = step.x[0] / before.x[0]
                self.b[k, :3] = weights[0], weights[1], weights[2] - self.e[k] * first_weights[0]
        self.history = {"u": u, "w": w} if np.any(u) else {}

    def _stage(self, first: int, k: int) -> tuple[Step, Float64s]:
        """Return the step from row `first` to the end of row k, and the weights of the history, newest first."""
        end = NoiseGrid(*(column[k + 1 : k + 2] for column in self._grid))
        log_snr = self._grid.log_snr
        h = log_snr[k + 1 : k + 2] - log_snr[first]
        step = solver_step(
            self._algorithm, end, h, end.alpha / self._grid.alpha[first], end.sigma / self._grid.sigma[first]
        )
        weights = np.zeros(k - first + 1)
        weights[-1] = step.d0[0]
        if k == first:
            return step, weights
        inside = log_snr[k:first:-1] - log_snr[first]  # λ of the later values, newest first
        check_distinct_sigmas(distinct=bool(np.all(inside) and len(np.unique(inside)) == len(inside)))
        per_step = h[0] / inside
        if k == first + 1:
            d1_weight = (step.d1 if self._heun else step.d1_midpoint)[0] * per_step[0]
            return step, weights + d1_weight * np.array([1.0, -1.0])
        newest, older = per_step[0] * np.array([1.0, 0.0, -1.0]), per_step[1] * np.array([0.0, 1.0, -1.0])
        if not self._heun:
            return step, weights + step.d1[0] * newest
        r0, r1 = 1 / per_step
        d1, d2 = (r0 * older - r1 * newest) / (r0 - r1), 2 * (newest - older) / (r0 - r1)
        return step, weights + step.d1[0] * d1 + step.d2[0] * d2

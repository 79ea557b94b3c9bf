"""DPM-Solver and DPM-Solver++ multistep, orders 1 to 3 (Lu et al. 2022, https://arxiv.org/abs/2211.01095)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import sigmas
from latentrt.sampling.samplers.dpm_solver import Algorithm, check_final_level, multistep_weights, solver_step
from latentrt.sampling.samplers.log_snr import FixedVariance, Levels, LogSNR, orders, usable_timesteps
from latentrt.sampling.samplers.options import StepsOffset
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["DPMSolverMultistep", "columns"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistep(LogSNR):
    """x_t = (σ_t / σ_s) x_s + α_t (1 − e^−h) x0 + terms in the slopes of x0 over λ = log(α / σ), with h = λ_t − λ_s.

    Two more values are what diffusers makes of them: algorithm_type `deis` is read as `dpmsolver++`, and solver_type
    `logrho`, `bh1` and `bh2` (of other solvers) as `midpoint`.
    """

    title: ClassVar[str] = "DPM-Solver++ multistep, 2M by default (Lu et al. 2022)"
    class_name: ClassVar[str] = "DPMSolverMultistepScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"timesteps", "mu"})

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -np.inf
    variance_type: FixedVariance | None = None
    timestep_spacing: sigmas.Spacing = "linspace"
    steps_offset: StepsOffset = 0
    rescale_betas_zero_snr: bool = False
    use_lu_lambdas: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def table(self, steps: Steps) -> Schedule:
        training = sigmas.sigmas(self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr))
        check_final_level(self.algorithm_type, self.final_sigmas_type)
        t, grid = self._grid(steps, training)
        t = steps.rest(t)
        final = 0.0 if self.final_sigmas_type == "zero" else training[0]
        levels = self.levels(np.append(grid, final)[steps.begin :])
        order = orders(
            steps,
            len(t),
            self.solver_order,
            lower_final=self.lower_order_final,
            first_at_end=self.euler_at_final or self.final_sigmas_type == "zero",
        )
        return columns(self, t, levels, order)

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64s]:
        """Timesteps and σ at each of them, [N]."""
        self.check_custom(steps, "use_lu_lambdas")
        if self.use_lu_lambdas and (self.respacing or self.use_flow_sigmas):
            other = f"use_{self.respacing}_sigmas" if self.respacing else "use_flow_sigmas"
            raise RequestError(f"found use_lu_lambdas and {other}, expected at most one of them; switch one off")
        keeps_fractions = self.beta_schedule == "squaredcos_cap_v2"
        found = self.respaced(steps, training, round_karras=not keeps_fractions)
        if found is None and self.use_lu_lambdas:
            high, low = (float(each) for each in np.log(training[[-1, 0]]))
            grid = np.exp(np.linspace(high, low, steps.count))  # evenly in λ
            t = sigmas.timesteps_of_sigmas(grid, training)
            found = (t if keeps_fractions else t.round()), grid
        if found is None:
            usable = usable_timesteps(training, self.lambda_min_clipped)
            t = self.whole_grid(steps, self.timestep_spacing, self.steps_offset, usable)
            found = t, np.interp(t, np.arange(len(training)), training)
        return found[0].astype(np.int64), found[1]


def columns(solver: Any, t: NDArray[Any], levels: Levels, order: NDArray[np.int64]) -> Schedule:
    """The table of a multistep solver whose steps have these orders."""
    algorithm: Algorithm = "dpmsolver++" if solver.algorithm_type == "deis" else solver.algorithm_type
    if algorithm == "sde-dpmsolver" and np.any(order == 3):
        raise RequestError(
            "found algorithm_type 'sde-dpmsolver' and solver_order 3, for which there is no formula; set solver_order "
            "to 2, or algorithm_type to 'sde-dpmsolver++'"
        )
    h, there = levels.h, Levels(*(column[1:] for column in levels))
    keep_alpha, keep_sigma = (column[1:] / column[:-1] for column in (levels.alpha, levels.sigma))
    step = solver_step(algorithm, there, h, keep_alpha, keep_sigma)
    solver_type = "heun" if solver.solver_type == "heun" else "midpoint"
    remembered = solver.remembers_x0 if algorithm.endswith("++") else solver.remembers_epsilon
    return Schedule.of(
        t=t,
        **remembered(levels),
        a=step.keep,
        b=multistep_weights(step, solver_type, h, order)[:, : max(int(order.max()), 1)],
        s=step.noise,
        noise_draws=int(algorithm.startswith("sde")),
        alpha=levels.alpha[:-1],
        sigma=levels.sigma[:-1],
    )

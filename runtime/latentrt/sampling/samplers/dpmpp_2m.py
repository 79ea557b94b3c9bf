"""DPM-Solver and DPM-Solver++ multistep, orders 1 to 3 (Lu et al. 2022, https://arxiv.org/abs/2211.01095)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling.samplers.dpm_solver import Algorithm, check_final_sigma, multistep_weights, solver_step
from latentrt.sampling.samplers.log_snr import FixedVariance, LogSNR, NoiseGrid, count_usable_timesteps, step_orders
from latentrt.sampling.samplers.options import StepsOffset
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import TimestepSpacing, sigmas_to_timesteps, training_sigmas

__all__ = ["DPMSolverMultistep", "multistep_schedule"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistep(LogSNR):
    """x_t = (σ_t / σ_s) x_s + α_t (1 − e^−h) x0 + terms in the differences of x0 over λ = log(α / σ), h = λ_t − λ_s.

    As in diffusers, algorithm_type `deis` means `dpmsolver++`, and solver_type `logrho`, `bh1` and `bh2` (of other
    solvers) mean `midpoint`.
    """

    title: ClassVar[str] = "DPM-Solver++ multistep, 2M by default (Lu et al. 2022)"
    class_name: ClassVar[str] = "DPMSolverMultistepScheduler"
    without_effect: ClassVar[Mapping[str, str]] = {
        "variance_type": "a fixed variance is that of the sampler; a learned one is refused",
        "time_shift_type": "with `use_dynamic_shifting`, another than `exponential` is refused",
    }
    run_options: ClassVar[frozenset[str]] = frozenset({"timesteps", "mu"})

    solver_order: Literal[1, 2, 3] = 2
    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -np.inf
    variance_type: FixedVariance | None = None
    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: StepsOffset = 0
    rescale_betas_zero_snr: bool = False
    use_lu_lambdas: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def table(self, steps: Steps) -> Schedule:
        training = training_sigmas(self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr))
        check_final_sigma(self.algorithm_type, self.final_sigmas_type)
        t, sigmas = self._grid(steps, training)
        t = steps.skip(t)
        final = 0.0 if self.final_sigmas_type == "zero" else training[0]
        order = step_orders(
            steps,
            len(t),
            self.solver_order,
            lower_final=self.lower_order_final,
            first_at_end=self.euler_at_final or self.final_sigmas_type == "zero",
        )
        return multistep_schedule(self, t, self.noise_grid(np.append(sigmas, final)[steps.begin :]), order)

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64s]:
        """Return timesteps and σ at each of them, [N]."""
        self.reject_given_grid(steps, "use_lu_lambdas")
        if self.use_lu_lambdas and (self.sigma_spacing or self.use_flow_sigmas):
            other = f"use_{self.sigma_spacing}_sigmas" if self.sigma_spacing else "use_flow_sigmas"
            raise RequestError(f"got `use_lu_lambdas` and `{other}`, expected at most one of them")
        keep_fractions = self.beta_schedule == "squaredcos_cap_v2"
        spaced = self.space_sigmas(steps, training, round_karras=not keep_fractions)
        if spaced is None and self.use_lu_lambdas:
            high, low = (float(each) for each in np.log(training[[-1, 0]]))
            sigmas = np.exp(np.linspace(high, low, steps.count))  # evenly in λ
            t = sigmas_to_timesteps(sigmas, training)
            spaced = (t if keep_fractions else t.round()), sigmas
        if spaced is None:
            usable = count_usable_timesteps(training, self.lambda_min_clipped)
            t = self.space_timesteps(steps, self.timestep_spacing, self.steps_offset, usable)
            spaced = t, np.interp(t, np.arange(len(training)), training)
        return spaced[0].astype(np.int64), spaced[1]


def multistep_schedule(solver: Any, t: NDArray[Any], grid: NoiseGrid, order: NDArray[np.int64]) -> Schedule:
    """Return the schedule of a multistep solver whose steps have these orders.

    Args:
        solver: a `DPMSolverMultistep` or its inverse.
        t: timesteps, [N].
        grid: the noise grid, [N + 1].
        order: of each step, [N].

    Raises:
        RequestError: a step of order 3 with an algorithm that has none.
    """
    algorithm: Algorithm = "dpmsolver++" if solver.algorithm_type == "deis" else solver.algorithm_type
    if algorithm == "sde-dpmsolver" and np.any(order == 3):
        raise RequestError(
            "got `algorithm_type` 'sde-dpmsolver' with `solver_order` 3, which has no formula; set `solver_order` to "
            "2, or `algorithm_type` to 'sde-dpmsolver++'"
        )
    h, (_, alpha, sigma), after = grid.h, grid.before(), grid.after()
    step = solver_step(algorithm, after, h, after.alpha / alpha, after.sigma / sigma)
    solver_type = "heun" if solver.solver_type == "heun" else "midpoint"
    return Schedule.of(
        t=t,
        **(solver.x0_columns(grid) if algorithm.endswith("++") else solver.epsilon_columns(grid)),
        a=step.x,
        b=multistep_weights(step, solver_type, h, order)[:, : max(int(order.max()), 1)],
        s=step.noise,
        noise_draws=int(algorithm.startswith("sde")),
        alpha=alpha,
        sigma=sigma,
    )

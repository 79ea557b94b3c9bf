"""DPM-Solver++ multistep, orders 1 and 2 (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt import prediction, sigmas
from latentrt.errors import RequestError
from latentrt.samplers.options import Sampler
from latentrt.schedule import Schedule

__all__ = ["DPMSolverMultistep"]

FEW_STEPS = 15  # below this, lower_order_final acts


@dataclass(frozen=True, kw_only=True)
class DPMSolverMultistep(Sampler):
    """x_t = (σ_t / σ_s) x_s + α_t (1 − e^−h) x0 + a term in the slope of x0 over λ = log(α / σ), with h = λ_t − λ_s.

    Two more values are what diffusers makes of them: algorithm_type `deis` is read as `dpmsolver++`, and solver_type
    `logrho`, `bh1` and `bh2` (of other solvers) as `midpoint`.
    """

    title: ClassVar[str] = "DPM-Solver++ 2M (Lu et al. 2022)"
    class_name: ClassVar[str] = "DPMSolverMultistepScheduler"

    prediction_type: prediction.PredictionType = "epsilon"
    timestep_spacing: sigmas.Spacing = "linspace"
    rescale_betas_zero_snr: bool = False
    solver_order: Literal[1, 2] = 2
    algorithm_type: Literal["dpmsolver++", "deis"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun", "logrho", "bh1", "bh2"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -np.inf
    use_karras_sigmas: bool = False
    use_exponential_sigmas: Literal[False] = False
    use_beta_sigmas: Literal[False] = False
    use_lu_lambdas: Literal[False] = False
    use_flow_sigmas: Literal[False] = False
    use_dynamic_shifting: Literal[False] = False
    thresholding: Literal[False] = False
    variance_type: None = None

    def schedule(self, num_inference_steps: int, eta: float = 0.0) -> Schedule:
        training = sigmas.sigmas(self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr))
        t, levels = self._grid(num_inference_steps, training)
        alpha, sigma = _unit_norm(levels)  # each [N + 1]: at every row and after the last
        p, q = prediction.x0(self.prediction_type, alpha[:-1], sigma[:-1])
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            a=sigma[1:] / sigma[:-1],
            b=self._weights(levels, alpha[1:]),
            alpha=alpha[:-1],
            sigma=sigma[:-1],
        )

    def _grid(self, count: int, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Timesteps [N], and the levels σ/α at each of them and after the last [N + 1]: float32 values in float64."""
        if self.use_karras_sigmas:
            levels = sigmas.karras(float(training[-1]), float(training[0]), count)
            t = sigmas.timesteps_of_sigmas(levels, training)
            if self.beta_schedule != "squaredcos_cap_v2":
                t = t.round()
        else:
            t = self._timesteps(count, training)
            levels = np.interp(t, np.arange(len(training)), training)
        final = 0.0 if self.final_sigmas_type == "zero" else training[0]
        return t.astype(np.int64), np.append(levels, final).astype(np.float32).astype(np.float64)

    def _timesteps(self, count: int, training: NDArray[np.float32]) -> NDArray[np.float64]:
        """A grid of one timestep more than asked for, less its last, over those whose λ is not clipped."""
        usable = self.num_train_timesteps - int(np.sum(-np.log(training) < self.lambda_min_clipped))
        if self.timestep_spacing == "trailing":
            return sigmas.visited(sigmas.trailing(count, self.num_train_timesteps, usable))
        if count >= usable:
            raise RequestError(
                f"found {count} steps, but {self.timestep_spacing} spacing has room for {max(usable - 1, 0)} "
                f"on the {usable} timesteps that can be used; ask for at most that many"
            )
        if self.timestep_spacing == "leading":
            return sigmas.leading(count + 1, usable)[:-1] + self.steps_offset
        return sigmas.linspace(count + 1, usable)[:-1].round()

    def _weights(self, levels: NDArray[np.float64], alpha: NDArray[np.float64]) -> NDArray[np.float64]:
        """The weights of x0 now and x0 one row ago, [N, 2].

        Args:
            levels: σ/α = e^−λ at every row and after the last, [N + 1].
            alpha: α after every row, [N].
        """
        first = alpha * (1 - levels[1:] / levels[:-1])  # α_t (1 − e^−h)
        slope = np.zeros_like(first)
        k = self._second_order_rows(len(first))
        h, h_before = np.log(levels[k] / levels[k + 1]), np.log(levels[k - 1] / levels[k])
        if not np.all(h_before):
            raise RequestError(
                "found two steps at the same noise level, between which a solver of order 2 finds no slope; "
                "ask for fewer steps, or set solver_order to 1"
            )
        if self.solver_type == "heun":
            slope[k] = (alpha[k] * h - first[k]) / h_before
        else:
            slope[k] = first[k] / 2 * h / h_before
        return np.stack([first + slope, -slope], axis=1)

    def _second_order_rows(self, count: int) -> NDArray[np.intp]:
        """All rows but the first, and but the last where that would not be stable."""
        few = self.lower_order_final and count < FEW_STEPS
        first_at_end = self.euler_at_final or few or self.final_sigmas_type == "zero"
        return np.arange(1, count - first_at_end if self.solver_order == 2 else 1)


def _unit_norm(levels: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """σ/α → α and σ with α² + σ² = 1."""
    alpha = 1 / np.hypot(levels, 1)
    return alpha, levels * alpha

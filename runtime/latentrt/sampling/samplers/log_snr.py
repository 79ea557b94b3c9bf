"""What do the samplers over the logarithm of the signal-to-noise ratio have in common?

Lu et al. 2022 solve the probability flow in λ = log(α / σ). Their latents have unit variance, x = α·x0 + σ·ε; along a
flow (`use_flow_sigmas`) α = 1 − σ instead. What is remembered of the model's outputs is x0 or ε.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import sigmas
from latentrt.sampling.samplers.options import Bounded, PositiveFloat, Respaced, TrainedSampler
from latentrt.sampling.samplers.steps import Steps

__all__ = ["FEW_STEPS", "FixedVariance", "Levels", "LogSNR", "check_levels_differ", "orders", "usable_timesteps"]

Float64s = NDArray[np.float64]

FEW_STEPS = 15  # below this, lower_order_final acts
FixedVariance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"]


class Levels(NamedTuple):
    """The noise at every row and after the last, [N + 1] each: as the grid has it, and as the latent's α and σ."""

    sigma_grid: Float64s
    alpha: Float64s
    sigma: Float64s

    @property
    def log_snr(self) -> Float64s:
        """λ; infinite where there is no noise."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def h(self) -> Float64s:
        """How far each step goes in λ, [N]."""
        log_snr = self.log_snr
        return log_snr[1:] - log_snr[:-1]


@dataclass(frozen=True, kw_only=True)
class LogSNR(Bounded, Respaced, TrainedSampler):
    """A sampler over λ."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    use_flow_sigmas: bool = False
    flow_shift: PositiveFloat = 1.0

    def levels(self, sigma_grid: Float64s) -> Levels:
        """Of σ/α, or of σ along a flow. The grid is rounded to float32, as diffusers keeps it."""
        grid = sigma_grid.astype(np.float32).astype(np.float64)
        if self.use_flow_sigmas:
            return Levels(grid, 1 - grid, grid)
        alpha = 1 / np.hypot(grid, 1)
        return Levels(grid, alpha, grid * alpha)

    def whole_grid(self, steps: Steps, spacing: sigmas.Spacing, offset: int, usable: int) -> Float64s:
        """Timesteps descending: one more than asked for, less the last, over the first `usable` of training."""
        if steps.timesteps is not None:
            return self.given_timesteps(steps, whole=True)
        if spacing == "trailing":
            return sigmas.visited(sigmas.trailing(steps.count, self.num_train_timesteps, usable))
        if steps.count >= usable:
            raise RequestError(
                f"found {steps.count} steps, but {spacing} spacing has room for {max(usable - 1, 0)} "
                f"on the {usable} timesteps that can be used; ask for at most that many"
            )
        if spacing == "leading":
            return sigmas.leading(steps.count + 1, usable)[:-1] + offset
        return sigmas.linspace(steps.count + 1, usable)[:-1].round()

    def respaced(
        self, steps: Steps, training: NDArray[np.float32], *, round_karras: bool = True, ascending: bool = False
    ) -> tuple[Float64s, Float64s] | None:
        """Timesteps and σ where levels are spread anew over all of training, or along a flow; else None.

        `ascending` does not concern a flow, whose levels diffusers leaves descending.

        Raises:
            RequestError: both are wanted.
        """
        shift = self.shift(steps)
        if self.use_flow_sigmas and self.respacing:
            raise RequestError(
                f"found use_flow_sigmas and use_{self.respacing}_sigmas, expected one of them: along a flow sigma is "
                "at most 1; switch one off"
            )
        self.check_custom(steps, "use_flow_sigmas")
        if self.use_flow_sigmas:
            sigma = sigmas.shifted(1 - np.linspace(1, 1 / self.num_train_timesteps, steps.count + 1), shift)
            return sigma[:0:-1] * self.num_train_timesteps, sigma[:0:-1]
        if self.respacing is None:
            return None
        first, last = training[[0, -1]].tolist() if ascending else training[[-1, 0]].tolist()
        sigma = sigmas.RESPACED[self.respacing](first, last, steps.count)
        t = sigmas.timesteps_of_sigmas(sigma, training)
        return t.round() if round_karras and self.respacing == "karras" else t, sigma

    def shift(self, steps: Steps) -> float:
        """The shift of a flow: the configuration's, or what mu makes of it."""
        if steps.mu is None:
            return self.flow_shift
        kind = getattr(self, "time_shift_type", None)
        if not getattr(self, "use_dynamic_shifting", False) or kind != "exponential":
            raise RequestError(
                f"found mu {steps.mu:g}, which needs use_dynamic_shifting and time_shift_type 'exponential' in the "
                "scheduler's configuration; set them, or leave mu out"
            )
        return exp(steps.mu)

    def x0(self, levels: Levels) -> tuple[Float64s, Float64s]:
        """The pair (p, q) with x0 = p·x + q·m at every row.

        A flow's velocity is taken off with the grid's σ and v with α and σ as they are, also where those do not fit
        together (v along a flow), because diffusers does so.
        """
        grid, alpha, sigma = (column[:-1] for column in levels)
        if self.prediction_type == "epsilon":
            return 1 / alpha, -sigma / alpha
        if self.prediction_type == "v_prediction":
            return alpha, -sigma
        if self.prediction_type == "flow_prediction":
            return np.ones_like(grid), -grid
        return np.zeros_like(grid), np.ones_like(grid)

    def epsilon(self, levels: Levels) -> tuple[Float64s, Float64s]:
        """The pair (p, q) with ε = p·x + q·m at every row."""
        _, alpha, sigma = (column[:-1] for column in levels)
        if self.prediction_type == "epsilon":
            return np.zeros_like(alpha), np.ones_like(alpha)
        if self.prediction_type == "v_prediction":
            return sigma, alpha
        if self.prediction_type == "flow_prediction":
            raise RequestError(
                "found prediction_type 'flow_prediction' with a solver in epsilon, expected one in x0; set "
                "algorithm_type 'dpmsolver++', or predict_x0, in the scheduler's configuration"
            )
        return 1 / sigma, -alpha / sigma

    def remembers_x0(self, levels: Levels) -> dict[str, Any]:
        """The columns of a solver in x0."""
        p, q = self.x0(levels)
        return {"p": p, "q": q, **self.bounds()}

    def remembers_epsilon(self, levels: Levels) -> dict[str, Any]:
        """The columns of a solver in ε; where x0 is limited, ε is derived from it again."""
        p, q = self.epsilon(levels)
        if not self.thresholding:
            return {"p": p, "q": q}
        _, alpha, sigma = (column[:-1] for column in levels)
        return {
            "p": (1 - sigma * p) / alpha,
            "q": -sigma * q / alpha,
            **self.bounds(),
            "u": 1 / sigma,
            "w": -alpha / sigma,
        }


def orders(steps: Steps, rows: int, solver_order: int, *, lower_final: bool, first_at_end: bool) -> NDArray[np.int64]:
    """The order of each row's step: it grows with what is remembered, and shrinks at the end where that is wanted."""
    order = np.minimum(np.arange(rows) + 1, solver_order)
    few = lower_final and rows + steps.begin < FEW_STEPS
    if few and rows > 1:
        order[-2] = min(order[-2], 2)
    if few or first_at_end:
        order[-1] = 1
    return order


def check_levels_differ(*, differ: bool) -> None:
    """A polynomial goes through values at different levels.

    Raises:
        RequestError: two are at the same.
    """
    if not differ:
        raise RequestError(
            "found two steps at the same noise level, between which there is no slope; ask for fewer steps, or for a "
            "solver of order 1"
        )


def usable_timesteps(training: NDArray[np.float32], lambda_min_clipped: float) -> int:
    """How many timesteps of training have a λ of at least this."""
    return len(training) - int(np.sum(-np.log(training) < lambda_min_clipped))

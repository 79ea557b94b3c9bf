"""The base of samplers over λ = log(α / σ), in which Lu et al. 2022 solve the probability flow.

Their latents have unit variance, x = α·x0 + σ·ε; along a flow (`use_flow_sigmas`) α = 1 − σ instead. The history holds
x0 or ε.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling.samplers.options import PositiveFloat, SigmaSpacing, Thresholding, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.sigmas import (
    SIGMA_SPACINGS,
    TimestepSpacing,
    drop_negative,
    leading_timesteps,
    linspace_timesteps,
    shift_sigmas,
    sigmas_to_timesteps,
    trailing_timesteps,
)

__all__ = [
    "FixedVariance",
    "LogSNR",
    "NoiseGrid",
    "check_distinct_sigmas",
    "count_usable_timesteps",
    "step_orders",
]

Float64s = NDArray[np.float64]

FEW_STEPS = 15  # below this, lower_order_final acts
FixedVariance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"]


class NoiseGrid(NamedTuple):
    """The noise before every row and after the last, [N + 1] each.

    Attributes:
        sigmas: the grid: σ / α, or σ along a flow.
        alpha, sigma: the factors of x0 and ε in the latents.
    """

    sigmas: Float64s
    alpha: Float64s
    sigma: Float64s

    @property
    def log_snr(self) -> Float64s:
        """λ, [N + 1]; infinite where σ is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    @property
    def h(self) -> Float64s:
        """The length of each step in λ, [N]."""
        log_snr = self.log_snr
        return log_snr[1:] - log_snr[:-1]

    def before(self) -> NoiseGrid:
        """Return the grid before each row, [N]."""
        return NoiseGrid(self.sigmas[:-1], self.alpha[:-1], self.sigma[:-1])

    def after(self) -> NoiseGrid:
        """Return the grid after each row, [N]."""
        return NoiseGrid(self.sigmas[1:], self.alpha[1:], self.sigma[1:])


@dataclass(frozen=True, kw_only=True)
class LogSNR(Thresholding, SigmaSpacing, TrainedSampler):
    """A sampler over λ."""

    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    use_flow_sigmas: bool = False
    flow_shift: PositiveFloat = 1.0

    def noise_grid(self, sigmas: Float64s) -> NoiseGrid:
        """Return the noise grid of σ / α, or of σ along a flow, rounded to float32 as in diffusers."""
        sigmas = sigmas.astype(np.float32).astype(np.float64)
        if self.use_flow_sigmas:
            return NoiseGrid(sigmas, 1 - sigmas, sigmas)
        alpha = 1 / np.hypot(sigmas, 1)
        return NoiseGrid(sigmas, alpha, sigmas * alpha)

    def space_timesteps(self, steps: Steps, spacing: TimestepSpacing, offset: int, usable: int) -> Float64s:
        """Return descending whole timesteps within the first `usable` of training: a grid of one more, less its last.

        Raises:
            RequestError: the grid has more steps than there are timesteps.
        """
        if steps.timesteps is not None:
            return self.given_timesteps(steps, whole=True)
        if spacing == "trailing":
            return drop_negative(trailing_timesteps(steps.count, self.num_train_timesteps, usable))
        if steps.count >= usable:
            raise RequestError(
                f"got {steps.count} steps (`num_inference_steps`), expected at most {max(usable - 1, 0)} with "
                f"{spacing} spacing of {usable} usable timesteps"
            )
        if spacing == "leading":
            return leading_timesteps(steps.count + 1, usable)[:-1] + offset
        return linspace_timesteps(steps.count + 1, usable)[:-1].round()

    def space_sigmas(
        self, steps: Steps, training: NDArray[np.float32], *, round_karras: bool = True, ascending: bool = False
    ) -> tuple[Float64s, Float64s] | None:
        """Return timesteps and σ of a grid that is spaced in σ or along a flow; None where it is spaced in timesteps.

        Args:
            steps: the options of the run.
            training: σ of each training timestep.
            round_karras: whether timesteps of the Karras spacing are rounded.
            ascending: whether σ ascends; diffusers ignores this along a flow.

        Raises:
            RequestError: both a flow and a spacing are set, or the grid is also given with the run.
        """
        shift = self.shift(steps)
        if self.use_flow_sigmas and self.sigma_spacing:
            raise RequestError(
                f"got `use_flow_sigmas` and `use_{self.sigma_spacing}_sigmas`, expected at most one of them"
            )
        self.reject_given_grid(steps, "use_flow_sigmas")
        if self.use_flow_sigmas:
            sigmas = shift_sigmas(1 - np.linspace(1, 1 / self.num_train_timesteps, steps.count + 1), shift)
            return sigmas[:0:-1] * self.num_train_timesteps, sigmas[:0:-1]
        if self.sigma_spacing is None:
            return None
        first, last = training[[0, -1]].tolist() if ascending else training[[-1, 0]].tolist()
        sigmas = SIGMA_SPACINGS[self.sigma_spacing](first, last, steps.count)
        t = sigmas_to_timesteps(sigmas, training)
        return t.round() if round_karras and self.sigma_spacing == "karras" else t, sigmas

    def shift(self, steps: Steps) -> float:
        """Return the shift of a flow: the configuration's, or e^mu.

        Raises:
            RequestError: the run has `mu`, and the configuration does not use it.
        """
        if steps.mu is None:
            return self.flow_shift
        kind = getattr(self, "time_shift_type", None)
        if not getattr(self, "use_dynamic_shifting", False) or kind != "exponential":
            raise RequestError(
                f"`mu`: got {steps.mu:g} without `use_dynamic_shifting` and `time_shift_type` 'exponential'; set them, "
                "or leave `mu` out"
            )
        return exp(steps.mu)

    def x0(self, grid: NoiseGrid) -> tuple[Float64s, Float64s]:
        """Return the pair (p, q) with x0 = p·x + q·m at every row.

        As in diffusers, a flow's velocity is converted with the grid's σ, and v with α and σ, also where those do not
        fit together (v along a flow).
        """
        sigmas, alpha, sigma = grid.before()
        if self.prediction_type == "epsilon":
            return 1 / alpha, -sigma / alpha
        if self.prediction_type == "v_prediction":
            return alpha, -sigma
        if self.prediction_type == "flow_prediction":
            return np.ones_like(sigmas), -sigmas
        return np.zeros_like(sigmas), np.ones_like(sigmas)

    def epsilon(self, grid: NoiseGrid) -> tuple[Float64s, Float64s]:
        """Return the pair (p, q) with ε = p·x + q·m at every row.

        Raises:
            RequestError: the model predicts a flow's velocity.
        """
        _, alpha, sigma = grid.before()
        if self.prediction_type == "epsilon":
            return np.zeros_like(alpha), np.ones_like(alpha)
        if self.prediction_type == "v_prediction":
            return sigma, alpha
        if self.prediction_type == "flow_prediction":
            raise RequestError(
                "got `prediction_type` 'flow_prediction' with a solver in epsilon, expected one in x0; set "
                "`algorithm_type` to 'dpmsolver++', or `predict_x0` to true"
            )
        return 1 / sigma, -alpha / sigma

    def x0_columns(self, grid: NoiseGrid) -> dict[str, Any]:
        """Return the columns of a solver in x0."""
        p, q = self.x0(grid)
        return {"p": p, "q": q, **self.limits()}

    def epsilon_columns(self, grid: NoiseGrid) -> dict[str, Any]:
        """Return the columns of a solver in ε; with thresholding, ε is computed from the limited x0."""
        p, q = self.epsilon(grid)
        if not self.thresholding:
            return {"p": p, "q": q}
        _, alpha, sigma = grid.before()
        return {
            "p": (1 - sigma * p) / alpha,
            "q": -sigma * q / alpha,
            **self.limits(),
            "u": 1 / sigma,
            "w": -alpha / sigma,
        }


def step_orders(
    steps: Steps, rows: int, solver_order: int, *, lower_final: bool, first_at_end: bool
) -> NDArray[np.int64]:
    """Return the order of each row's step, which grows with the history.

    Args:
        steps: the options of the run.
        rows: the number of rows.
        solver_order: the highest order.
        lower_final: whether the last steps are of lower order, in runs of fewer than `FEW_STEPS` steps.
        first_at_end: whether the last step is of order 1.
    """
    order = np.minimum(np.arange(rows) + 1, solver_order)
    few = lower_final and rows + steps.begin < FEW_STEPS
    if few and rows > 1:
        order[-2] = min(order[-2], 2)
    if few or first_at_end:
        order[-1] = 1
    return order


def check_distinct_sigmas(*, distinct: bool) -> None:
    """Check that the values of a polynomial are at distinct σ.

    Raises:
        RequestError: `distinct` is False.
    """
    if not distinct:
        raise RequestError(
            "two steps have the same sigma, where a solver of order 2 is undefined; reduce `num_inference_steps` or "
            "`solver_order`"
        )


def count_usable_timesteps(training: NDArray[np.float32], lambda_min_clipped: float) -> int:
    """Return the number of training timesteps whose λ is at least `lambda_min_clipped`."""
    return len(training) - int(np.sum(-np.log(training) < lambda_min_clipped))

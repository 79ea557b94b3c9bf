"""UniPC: a unified predictor and corrector, orders 1 to 3 (Zhao et al. 2023, https://arxiv.org/abs/2302.04867)."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import sigmas
from latentrt.sampling.samplers.corrector import corrected_weights
from latentrt.sampling.samplers.log_snr import LogSNR, check_levels_differ
from latentrt.sampling.samplers.options import PositiveFloat, StepsOffset
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["UniPC"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class UniPC(LogSNR):
    """UniP-p and UniC-p (algorithms 5 to 8), in x0 (`predict_x0`) or in ε.

    solver_type is what B(h) is: h (`bh1`) or e^h − 1 (`bh2`); those of other solvers are read as `bh2`, as diffusers
    does. `disable_corrector` counts steps from 0: after these no correction follows.
    """

    title: ClassVar[str] = "UniPC, predictor and corrector (Zhao et al. 2023), order 2 by default"
    class_name: ClassVar[str] = "UniPCMultistepScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"mu", "sigmas"})

    solver_order: Literal[1, 2, 3] = 2
    predict_x0: bool = True
    solver_type: Literal["bh1", "bh2", "midpoint", "heun", "logrho"] = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    timestep_spacing: sigmas.Spacing = "linspace"
    steps_offset: StepsOffset = 0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    sigma_min: PositiveFloat | None = None
    sigma_max: PositiveFloat | None = None
    shift_terminal: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None

    def table(self, steps: Steps) -> Schedule:
        training = sigmas.sigmas(self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr))
        t, grid = self._grid(steps, training)
        levels, t = self.levels(grid[steps.begin :]), t[steps.begin :]
        order = np.minimum(np.arange(len(t)) + 1, self.solver_order)
        if self.lower_order_final:
            order = np.minimum(order, len(t) - np.arange(len(t)))
        self._check_end(order, levels.sigma[-1])
        log_snr = levels.log_snr
        predictor = np.zeros((len(t), self.solver_order))
        corrector = np.zeros((len(t), self.solver_order + 1))
        # In x0 everything is of −h, times α; in ε of h, times σ.
        sign, scale = (-1.0, levels.alpha) if self.predict_x0 else (1.0, levels.sigma)
        for k in range(len(t)):
            known = log_snr[k::-1][: order[k]]
            weights = _weights(known, log_snr[k + 1], sign, corrects=False, bh1=self.solver_type == "bh1")
            predictor[k, : order[k]] = -scale[k + 1] * weights
            if k:
                known = log_snr[k - 1 :: -1][: order[k - 1]]
                weights = _weights(known, log_snr[k], sign, corrects=True, bh1=self.solver_type == "bh1")
                corrector[k, : order[k - 1] + 1] = -scale[k] * weights
        corrects = np.array([k > 0 and k + steps.begin - 1 not in self.disable_corrector for k in range(len(t))])
        kept = levels.sigma if self.predict_x0 else levels.alpha
        keep = kept[1:] / kept[:-1]
        return Schedule.of(
            t=t,
            **(self.remembers_x0(levels) if self.predict_x0 else self._epsilon(levels)),
            a=keep,
            b=corrected_weights(keep, predictor, corrector, corrects),
            alpha=levels.alpha[:-1],
            sigma=levels.sigma[:-1],
        )

    def _epsilon(self, levels: Any) -> dict[str, Any]:
        """The columns of ε; diffusers limits x0 only where that is what it remembers."""
        p, q = self.epsilon(levels)
        return {"p": p, "q": q}

    def _check_end(self, order: NDArray[np.int64], last_sigma: float) -> None:
        if last_sigma > 0:
            return
        if order[-1] > 1:
            raise RequestError(
                "found lower_order_final false and a last level of zero, where a solver of order 2 finds no slope; "
                "set lower_order_final, or final_sigmas_type to 'sigma_min'"
            )
        if not self.predict_x0:
            raise RequestError(
                "found predict_x0 false and a last level of zero, where epsilon is not known; set final_sigmas_type to "
                "'sigma_min', or predict_x0"
            )

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64s]:
        """Timesteps [N], and σ at each of them and after the last [N + 1]."""
        if self.shift_terminal is not None and not self.use_flow_sigmas:
            raise RequestError("found shift_terminal without use_flow_sigmas, expected both or neither")
        if steps.sigmas is not None and not self.use_flow_sigmas:
            raise RequestError("found sigmas, which this sampler takes only along a flow (use_flow_sigmas)")
        if self.use_dynamic_shifting and steps.mu is None:
            raise RequestError("found use_dynamic_shifting, which needs mu, the logarithm of the shift; give it")
        if steps.mu is not None and not self.use_dynamic_shifting:
            raise RequestError("found mu, which needs use_dynamic_shifting in the scheduler's configuration; set that")
        zero = self.final_sigmas_type == "zero"
        if self.use_flow_sigmas and self.respacing == "karras" and steps.sigmas is None:
            grid = self._spread(training, steps)
            grid = grid / (grid + 1)
            t = grid * self.num_train_timesteps
        elif self.use_flow_sigmas and self.respacing is None:
            grid = self._flow(steps)
            t = grid * self.num_train_timesteps
        elif self.use_flow_sigmas:
            raise RequestError("found use_flow_sigmas and other levels, expected one of them; switch one off")
        elif self.respacing:
            grid = self._spread(training, steps)
            t = sigmas.timesteps_of_sigmas(grid, training)
            t = t.round() if self.respacing == "karras" else t
        else:
            t = self.whole_grid(steps, self.timestep_spacing, self.steps_offset, self.num_train_timesteps)
            grid = np.interp(t, np.arange(len(training)), training)
            return t.astype(np.int64), np.append(grid, 0.0 if zero else training[0])
        return t.astype(np.int64), np.append(grid, 0.0 if zero else grid[-1])

    def _spread(self, training: NDArray[np.float32], steps: Steps) -> Float64s:
        high = float(training[-1]) if self.sigma_max is None else self.sigma_max
        low = float(training[0]) if self.sigma_min is None else self.sigma_min
        sigmas.check_ends(low, high)
        return sigmas.RESPACED[str(self.respacing)](high, low, steps.count)

    def _flow(self, steps: Steps) -> Float64s:
        if steps.sigmas is None:
            grid = np.linspace(1, 1 / self.num_train_timesteps, steps.count + 1)[:-1]
        else:
            grid = np.array(steps.sigmas, np.float64)
            if not 0 < grid[-1] <= grid[0] <= 1:
                raise RequestError(f"found sigmas from {grid[0]:g} to {grid[-1]:g}, expected them above 0 and up to 1")
        if steps.mu is None:
            grid = sigmas.shifted(grid, self.flow_shift)
        else:
            grid = sigmas.dynamically_shifted(grid, steps.mu, self.time_shift_type)
        if self.shift_terminal:
            grid = sigmas.stretched(grid, self.shift_terminal)
        if abs(grid[0] - 1) < 1e-6:
            grid[0] -= 1e-6  # a pure flow of noise has no λ; diffusers' choice
        return grid


def _weights(known: Float64s, target: float, sign: float, *, corrects: bool, bh1: bool) -> Float64s:
    """The weights of x0, or of ε, at the points that are known, newest first; for the corrector also at the target.

    Args:
        known: λ at the points, newest first, [order].
        target: λ after the step; may be infinite where a single point is known.
        sign: −1 in x0, 1 in ε.
        corrects: whether the value at the target is one of the points.
        bh1: what B(h) is.

    Returns:
        [order], or [1 + order] with the target's first; to be multiplied by −α or −σ.
    """
    order, h = len(known), target - known[0]
    hh = sign * h
    whole = np.expm1(hh)  # h·φ₁
    if order == 1 and not corrects:
        return np.array([whole])
    if h == 0 and not corrects:
        return np.zeros(order)  # the last of Karras' levels is the end of training's
    big_b = hh if bh1 else whole
    ratios = np.append((known[1:] - known[0]) / (h or 1.0), 1.0)  # r_1 …, 1
    check_levels_differ(differ=bool(h != 0 and len(np.unique(ratios)) == order and np.all(ratios != 0)))
    moments, phi = np.empty(order), whole / hh - 1
    for i in range(order):
        moments[i] = phi * factorial(i + 1) / big_b
        phi = phi / hh - 1 / factorial(i + 2)
    powers = np.vander(ratios, order, increasing=True).T
    if corrects:
        rho = np.array([0.5]) if order == 1 else np.linalg.solve(powers, moments)
    else:
        rho = np.array([0.5]) if order == 2 else np.linalg.solve(powers[:-1, :-1], moments[:-1])
    slopes = big_b * rho[: order - 1] / ratios[:-1]  # of the differences m_i − m_0
    weights = np.concatenate([[whole - slopes.sum()], slopes])
    if corrects:
        last = big_b * rho[-1]
        weights[0] -= last
        weights = np.concatenate([[last], weights])
    return weights

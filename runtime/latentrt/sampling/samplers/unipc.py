"""UniPC: a unified predictor and corrector, orders 1 to 3 (Zhao et al. 2023, https://arxiv.org/abs/2302.04867)."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling.samplers.log_snr import LogSNR, NoiseGrid, check_distinct_sigmas
from latentrt.sampling.samplers.multistep import fuse_corrector
from latentrt.sampling.samplers.options import PositiveFloat, StepsOffset
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import (
    SIGMA_SPACINGS,
    TimestepSpacing,
    check_sigma_range,
    shift_sigmas,
    shift_sigmas_dynamically,
    sigmas_to_timesteps,
    stretch_sigmas_to_terminal,
    training_sigmas,
)

__all__ = ["UniPC"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class UniPC(LogSNR):
    """UniP-p and UniC-p (algorithms 5 to 8), in x0 (`predict_x0`) or in ε.

    solver_type selects B(h): h (`bh1`) or e^h − 1 (`bh2`); as in diffusers, those of other solvers mean `bh2`.
    `disable_corrector` lists steps, from 0, after which there is no correction.
    """

    title: ClassVar[str] = "UniPC, predictor and corrector (Zhao et al. 2023), order 2 by default"
    class_name: ClassVar[str] = "UniPCMultistepScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"mu", "sigmas"})

    solver_order: Literal[1, 2, 3] = 2
    predict_x0: bool = True
    solver_type: Literal["bh1", "bh2", "midpoint", "heun", "logrho"] = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: StepsOffset = 0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    rescale_betas_zero_snr: bool = False
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    sigma_min: PositiveFloat | None = None
    sigma_max: PositiveFloat | None = None
    shift_terminal: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None

    def table(self, steps: Steps) -> Schedule:
        training = training_sigmas(self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr))
        t, sigmas = self._grid(steps, training)
        grid, t = self.noise_grid(sigmas[steps.begin :]), t[steps.begin :]
        order = np.minimum(np.arange(len(t)) + 1, self.solver_order)
        if self.lower_order_final:
            order = np.minimum(order, len(t) - np.arange(len(t)))
        self._check_end(order, grid.sigma[-1])
        log_snr = grid.log_snr
        predictor = np.zeros((len(t), self.solver_order))
        corrector = np.zeros((len(t), self.solver_order + 1))
        # In x0 the weights are functions of −h, times α; in ε of h, times σ.
        sign, scale = (-1.0, grid.alpha) if self.predict_x0 else (1.0, grid.sigma)
        for k in range(len(t)):
            points = log_snr[k::-1][: order[k]]
            weights = _weights(points, log_snr[k + 1], sign, corrects=False, bh1=self.solver_type == "bh1")
            predictor[k, : order[k]] = -scale[k + 1] * weights
            if k:
                points = log_snr[k - 1 :: -1][: order[k - 1]]
                weights = _weights(points, log_snr[k], sign, corrects=True, bh1=self.solver_type == "bh1")
                corrector[k, : order[k - 1] + 1] = -scale[k] * weights
        corrects = np.array([k > 0 and k + steps.begin - 1 not in self.disable_corrector for k in range(len(t))])
        factor = grid.sigma if self.predict_x0 else grid.alpha
        a = factor[1:] / factor[:-1]
        return Schedule.of(
            t=t,
            **(self.x0_columns(grid) if self.predict_x0 else self.epsilon_columns(grid)),
            a=a,
            b=fuse_corrector(a, predictor, corrector, corrects),
            alpha=grid.alpha[:-1],
            sigma=grid.sigma[:-1],
        )

    def epsilon_columns(self, grid: NoiseGrid) -> dict[str, Any]:
        """Return the columns of a solver in ε; diffusers limits x0 only in solvers in x0."""
        p, q = self.epsilon(grid)
        return {"p": p, "q": q}

    def _check_end(self, order: NDArray[np.int64], last_sigma: float) -> None:
        if last_sigma > 0:
            return
        if order[-1] > 1:
            raise RequestError(
                "got `lower_order_final` false with a last sigma of zero, where a solver of order 2 is undefined; set "
                "`lower_order_final`, or `final_sigmas_type` to 'sigma_min'"
            )
        if not self.predict_x0:
            raise RequestError(
                "got `predict_x0` false with a last sigma of zero, where epsilon is undefined; set `final_sigmas_type` "
                "to 'sigma_min', or `predict_x0` to true"
            )

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64s]:
        """Return timesteps [N], and σ at each of them and after the last [N + 1]."""
        if self.shift_terminal is not None and not self.use_flow_sigmas:
            raise RequestError("got `shift_terminal` without `use_flow_sigmas`, expected both or neither")
        if steps.sigmas is not None and not self.use_flow_sigmas:
            raise RequestError("got `sigmas` without `use_flow_sigmas`, expected both or neither")
        if self.use_dynamic_shifting and steps.mu is None:
            raise RequestError("got `use_dynamic_shifting` without `mu`, the logarithm of the shift; set it")
        if steps.mu is not None and not self.use_dynamic_shifting:
            raise RequestError("got `mu` without `use_dynamic_shifting`; leave it out, or set both")
        zero = self.final_sigmas_type == "zero"
        if self.use_flow_sigmas and self.sigma_spacing == "karras" and steps.sigmas is None:
            sigmas = self._space(training, steps)
            sigmas = sigmas / (sigmas + 1)
            t = sigmas * self.num_train_timesteps
        elif self.use_flow_sigmas and self.sigma_spacing is None:
            sigmas = self._flow_sigmas(steps)
            t = sigmas * self.num_train_timesteps
        elif self.use_flow_sigmas:
            given = "sigmas" if self.sigma_spacing == "karras" else "use_flow_sigmas"
            raise RequestError(f"got `{given}` and `use_{self.sigma_spacing}_sigmas`, expected at most one of them")
        elif self.sigma_spacing:
            sigmas = self._space(training, steps)
            t = sigmas_to_timesteps(sigmas, training)
            t = t.round() if self.sigma_spacing == "karras" else t
        else:
            t = self.space_timesteps(steps, self.timestep_spacing, self.steps_offset, self.num_train_timesteps)
            sigmas = np.interp(t, np.arange(len(training)), training)
            return t.astype(np.int64), np.append(sigmas, 0.0 if zero else training[0])
        return t.astype(np.int64), np.append(sigmas, 0.0 if zero else sigmas[-1])

    def _space(self, training: NDArray[np.float32], steps: Steps) -> Float64s:
        high = float(training[-1]) if self.sigma_max is None else self.sigma_max
        low = float(training[0]) if self.sigma_min is None else self.sigma_min
        check_sigma_range(low, high)
        return SIGMA_SPACINGS[str(self.sigma_spacing)](high, low, steps.count)

    def _flow_sigmas(self, steps: Steps) -> Float64s:
        if steps.sigmas is None:
            sigmas = np.linspace(1, 1 / self.num_train_timesteps, steps.count + 1)[:-1]
        else:
            sigmas = np.array(steps.sigmas, np.float64)
            if not 0 < sigmas[-1] <= sigmas[0] <= 1:
                raise RequestError(
                    f"got `sigmas` from {sigmas[0]:g} to {sigmas[-1]:g}, expected them above 0 and at most 1"
                )
        if steps.mu is None:
            sigmas = shift_sigmas(sigmas, self.flow_shift)
        else:
            sigmas = shift_sigmas_dynamically(sigmas, steps.mu, self.time_shift_type)
        if self.shift_terminal:
            sigmas = stretch_sigmas_to_terminal(sigmas, self.shift_terminal)
        if abs(sigmas[0] - 1) < 1e-6:
            sigmas[0] -= 1e-6  # λ is undefined at σ = 1; diffusers' choice
        return sigmas


def _weights(points: Float64s, target: float, sign: float, *, corrects: bool, bh1: bool) -> Float64s:
    """Return the weights of x0, or of ε, at the points, newest first; for the corrector also at the target.

    Args:
        points: λ of the history, newest first, [order].
        target: λ after the step; may be infinite with a single point.
        sign: −1 in x0, 1 in ε.
        corrects: whether the value at the target is one of the points.
        bh1: whether B(h) is h; otherwise e^h − 1.

    Returns:
        [order], or [1 + order] with the target's first; to be multiplied by −α or −σ.
    """
    order, h = len(points), target - points[0]
    hh = sign * h
    h_phi_1 = np.expm1(hh)
    if order == 1 and not corrects:
        return np.array([h_phi_1])
    if h == 0 and not corrects:
        return np.zeros(order)  # the last Karras σ is the end of training
    big_b = hh if bh1 else h_phi_1
    ratios = np.append((points[1:] - points[0]) / (h or 1.0), 1.0)  # r_1 …, 1
    check_distinct_sigmas(distinct=bool(h != 0 and len(np.unique(ratios)) == order and np.all(ratios != 0)))
    moments, phi = np.empty(order), h_phi_1 / hh - 1
    for i in range(order):
        moments[i] = phi * factorial(i + 1) / big_b
        phi = phi / hh - 1 / factorial(i + 2)
    powers = np.vander(ratios, order, increasing=True).T
    if corrects:
        rho = np.array([0.5]) if order == 1 else np.linalg.solve(powers, moments)
    else:
        rho = np.array([0.5]) if order == 2 else np.linalg.solve(powers[:-1, :-1], moments[:-1])
    differences = big_b * rho[: order - 1] / ratios[:-1]  # the weights of m_i − m_0
    weights = np.concatenate([[h_phi_1 - differences.sum()], differences])
    if corrects:
        last = big_b * rho[-1]
        weights[0] -= last
        weights = np.concatenate([[last], weights])
    return weights

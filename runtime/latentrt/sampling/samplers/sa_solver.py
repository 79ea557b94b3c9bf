"""SA-Solver: stochastic Adams, predictor and corrector (Xue et al. 2023, https://arxiv.org/abs/2309.05019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import sigmas
from latentrt.sampling.samplers.corrector import corrected_weights
from latentrt.sampling.samplers.lagrange import adams_weights
from latentrt.sampling.samplers.log_snr import FixedVariance, Levels, LogSNR, check_levels_differ, usable_timesteps
from latentrt.sampling.samplers.options import StepsOffset
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["SASolver"]

Float64s = NDArray[np.float64]
NOISY_TIMESTEPS = (200, 800)  # where τ = 1, as diffusers has it; elsewhere it is 0


@dataclass(frozen=True, kw_only=True)
class SASolver(LogSNR):
    """Algorithm 1: Adams' methods over λ for the reverse SDE whose noise is τ times that of the original one."""

    title: ClassVar[str] = "SA-Solver, stochastic Adams (Xue et al. 2023); fresh noise in the middle"
    class_name: ClassVar[str] = "SASolverScheduler"

    predictor_order: Literal[1, 2, 3, 4] = 2
    corrector_order: Literal[1, 2, 3, 4] = 2
    tau_func: None = None
    algorithm_type: Literal["data_prediction", "noise_prediction"] = "data_prediction"
    lower_order_final: bool = True
    lambda_min_clipped: float = -np.inf
    variance_type: FixedVariance | None = None
    timestep_spacing: sigmas.Spacing = "linspace"
    steps_offset: StepsOffset = 0

    def table(self, steps: Steps) -> Schedule:
        if self.thresholding and self.algorithm_type == "noise_prediction":
            raise RequestError(
                "found thresholding and algorithm_type 'noise_prediction', expected one of them; set algorithm_type "
                "to 'data_prediction', or switch thresholding off"
            )
        t, grid = self._grid(steps, sigmas.sigmas(self.alphas_cumprod()))
        t, levels = steps.rest(t), self.levels(grid[steps.begin :])
        tau = ((t >= NOISY_TIMESTEPS[0]) & (t <= NOISY_TIMESTEPS[1])).astype(np.float64)
        in_x0, h = self.algorithm_type == "data_prediction", levels.h
        if in_x0:
            keep = np.exp(-(tau**2) * h) * levels.sigma[1:] / levels.sigma[:-1]
            noise = np.sqrt(-np.expm1(-2 * tau**2 * h))
        else:
            keep = levels.alpha[1:] / levels.alpha[:-1]
            noise = tau * np.sqrt(np.expm1(2 * h))
        predictor, corrector = self._weights(levels, tau)
        return Schedule.of(
            t=t,
            **(self.remembers_x0(levels) if in_x0 else self.remembers_epsilon(levels)),
            a=keep,
            b=corrected_weights(keep, predictor, corrector, np.arange(len(t)) > 0),
            s=levels.sigma[1:] * noise,
            noise_draws=1,
            alpha=levels.alpha[:-1],
            sigma=levels.sigma[:-1],
        )

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64s]:
        """Timesteps [N], and σ at each of them and after the last [N + 1]."""
        found = self.respaced(steps, training)
        if found is not None:
            return found[0].astype(np.int64), np.append(found[1], found[1][-1])
        usable = usable_timesteps(training, self.lambda_min_clipped)
        t = self.whole_grid(steps, self.timestep_spacing, self.steps_offset, usable)
        grid = np.interp(t, np.arange(len(training)), training)
        return t.astype(np.int64), np.append(grid, training[0])

    def _weights(self, levels: Levels, tau: Float64s) -> tuple[Float64s, Float64s]:
        """Of each row's prediction, and of the correction of the step that led to it; newest first."""
        count, log_snr = len(tau), levels.log_snr
        most = max(self.predictor_order, self.corrector_order - 1)
        predictor, corrector = np.zeros((count, most)), np.zeros((count, most + 1))
        for k in range(count):
            left = count - k if self.lower_order_final else most
            order = min(self.predictor_order, left, k + 1)
            predictor[k, :order] = self._step(levels, tau[k], log_snr[k::-1][:order], k, predicts=True)
            if k:
                left = count - k + 2 if self.lower_order_final else most + 1
                order = min(self.corrector_order, left, k + 1)
                corrector[k, :order] = self._step(levels, tau[k - 1], log_snr[k::-1][:order], k - 1, predicts=False)
        return predictor, corrector

    def _step(self, levels: Levels, tau: float, points: Float64s, k: int, *, predicts: bool) -> Float64s:
        """The weights at some points of the step from row k, whose integrals are the paper's equations 14 and 17."""
        start, end = levels.log_snr[k : k + 2]
        check_levels_differ(differ=bool(len(np.unique(points)) == len(points)))
        twice = 1 + tau**2
        in_x0 = self.algorithm_type == "data_prediction"
        rate = twice if in_x0 else -1.0
        weights = adams_weights(points[np.newaxis], np.array([start]), np.array([end]), rate)[0]
        if in_x0 and len(points) == 2:
            # Of order 2, the coefficient that makes it DPM-Solver++(2M) where τ = 0 (the paper's appendix on 2M).
            h = end - start
            exact = (h * twice - 1 + np.exp(-twice * h)) / twice**2
            shift = (h**2 / 2 - exact) / (points[0] - points[1]) if h else 0.0
            weights = weights + shift * np.array([1.0, -1.0])
        scale = levels.alpha[k + 1] if in_x0 else -levels.sigma[k + 1]
        return np.asarray(twice * scale * weights)

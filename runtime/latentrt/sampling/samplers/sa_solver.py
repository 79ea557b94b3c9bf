"""SA-Solver: stochastic Adams, predictor and corrector (Xue et al. 2023, https://arxiv.org/abs/2309.05019)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling.samplers.log_snr import (
    FixedVariance,
    LogSNR,
    NoiseGrid,
    check_distinct_sigmas,
    count_usable_timesteps,
)
from latentrt.sampling.samplers.multistep import adams_weights, fuse_corrector
from latentrt.sampling.samplers.options import StepsOffset
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import TimestepSpacing, training_sigmas

__all__ = ["SASolver"]

Float64s = NDArray[np.float64]
NOISY_TIMESTEPS = (200, 800)  # τ = 1 between them, and 0 elsewhere; diffusers' default


@dataclass(frozen=True, kw_only=True)
class SASolver(LogSNR):
    """Algorithm 1: Adams methods over λ for the reverse SDE with τ times the noise of the original one."""

    title: ClassVar[str] = "SA-Solver, stochastic Adams (Xue et al. 2023); fresh noise in the middle"
    class_name: ClassVar[str] = "SASolverScheduler"
    without_effect: ClassVar[Mapping[str, str]] = {
        "variance_type": "a fixed variance is that of the sampler; a learned one is refused",
    }

    predictor_order: Literal[1, 2, 3, 4] = 2
    corrector_order: Literal[1, 2, 3, 4] = 2
    tau_func: None = None
    algorithm_type: Literal["data_prediction", "noise_prediction"] = "data_prediction"
    lower_order_final: bool = True
    lambda_min_clipped: float = -np.inf
    variance_type: FixedVariance | None = None
    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: StepsOffset = 0

    def table(self, steps: Steps) -> Schedule:
        if self.thresholding and self.algorithm_type == "noise_prediction":
            raise RequestError(
                "got `thresholding` with `algorithm_type` 'noise_prediction', expected one of them; set "
                "`algorithm_type` to 'data_prediction', or `thresholding` to false"
            )
        t, sigmas = self._grid(steps, training_sigmas(self.alphas_cumprod()))
        t, grid = steps.skip(t), self.noise_grid(sigmas[steps.begin :])
        tau = ((t >= NOISY_TIMESTEPS[0]) & (t <= NOISY_TIMESTEPS[1])).astype(np.float64)
        in_x0, h = self.algorithm_type == "data_prediction", grid.h
        if in_x0:
            a = np.exp(-(tau**2) * h) * grid.sigma[1:] / grid.sigma[:-1]
            noise = np.sqrt(-np.expm1(-2 * tau**2 * h))
        else:
            a = grid.alpha[1:] / grid.alpha[:-1]
            noise = tau * np.sqrt(np.expm1(2 * h))
        predictor, corrector = self._weights(grid, tau)
        return Schedule.of(
            t=t,
            **(self.x0_columns(grid) if in_x0 else self.epsilon_columns(grid)),
            a=a,
            b=fuse_corrector(a, predictor, corrector, np.arange(len(t)) > 0),
            s=grid.sigma[1:] * noise,
            noise_draws=1,
            alpha=grid.alpha[:-1],
            sigma=grid.sigma[:-1],
        )

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[NDArray[np.int64], Float64s]:
        """Return timesteps [N], and σ at each of them and after the last [N + 1]."""
        spaced = self.space_sigmas(steps, training)
        if spaced is not None:
            return spaced[0].astype(np.int64), np.append(spaced[1], spaced[1][-1])
        usable = count_usable_timesteps(training, self.lambda_min_clipped)
        t = self.space_timesteps(steps, self.timestep_spacing, self.steps_offset, usable)
        sigmas = np.interp(t, np.arange(len(training)), training)
        return t.astype(np.int64), np.append(sigmas, training[0])

    def _weights(self, grid: NoiseGrid, tau: Float64s) -> tuple[Float64s, Float64s]:
        """Return the weights of each row's predictor, and of the corrector of the step that led to it; newest first."""
        count, log_snr = len(tau), grid.log_snr
        most = max(self.predictor_order, self.corrector_order - 1)
        predictor, corrector = np.zeros((count, most)), np.zeros((count, most + 1))
        for k in range(count):
            left = count - k if self.lower_order_final else most
            order = min(self.predictor_order, left, k + 1)
            predictor[k, :order] = self._step_weights(grid, tau[k], log_snr[k::-1][:order], k)
            if k:
                left = count - k + 2 if self.lower_order_final else most + 1
                order = min(self.corrector_order, left, k + 1)
                corrector[k, :order] = self._step_weights(grid, tau[k - 1], log_snr[k::-1][:order], k - 1)
        return predictor, corrector

    def _step_weights(self, grid: NoiseGrid, tau: float, points: Float64s, k: int) -> Float64s:
        """Return the weights of the values at λ `points` in the step from row k (equations 14 and 17), newest first."""
        start, end = grid.log_snr[k : k + 2]
        check_distinct_sigmas(distinct=bool(len(np.unique(points)) == len(points)))
        decay = 1 + tau**2
        in_x0 = self.algorithm_type == "data_prediction"
        weights = adams_weights(points[np.newaxis], np.array([start]), np.array([end]), decay if in_x0 else -1.0)[0]
        if in_x0 and len(points) == 2:
            # Of order 2, the coefficient that makes it DPM-Solver++(2M) where τ = 0 (the paper's appendix on 2M).
            h = end - start
            exact = (h * decay - 1 + np.exp(-decay * h)) / decay**2
            shift = (h**2 / 2 - exact) / (points[0] - points[1]) if h else 0.0
            weights = weights + shift * np.array([1.0, -1.0])
        scale = grid.alpha[k + 1] if in_x0 else -grid.sigma[k + 1]
        return np.asarray(decay * scale * weights)

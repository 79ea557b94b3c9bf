"""DDPM: denoising diffusion probabilistic models (Ho, Jain, Abbeel 2020, https://arxiv.org/abs/2006.11239)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling import prediction
from latentrt.sampling.samplers.options import PositiveFloat, StepsOffset, Thresholding, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import TimestepSpacing, alpha_bar_at

__all__ = ["DDPM", "MIN_VARIANCE", "posterior"]

MIN_VARIANCE = 1e-20


@dataclass(frozen=True, kw_only=True)
class DDPM(Thresholding, TrainedSampler):
    """Equation 7: the mean of the posterior q(x_{t−1} | x_t, x0) and noise of its variance, or of β (`fixed_large`)."""

    title: ClassVar[str] = "DDPM (Ho et al. 2020); fresh noise at every step"
    class_name: ClassVar[str] = "DDPMScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"timesteps"})

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"] = "linear"  # type: ignore[assignment]  # more than its base
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large"] = "fixed_small"
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: StepsOffset = 0
    rescale_betas_zero_snr: bool = False
    clip_sample: bool = True
    clip_sample_range: PositiveFloat = 1.0

    def table(self, steps: Steps) -> Schedule:
        alpha_bar = self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr)
        t = self.whole_timesteps(steps, self.timestep_spacing, self.steps_offset)
        alpha_bar_t = alpha_bar_at(alpha_bar, t, 1.0)
        alpha_bar_prev = alpha_bar_at(alpha_bar, np.append(t[1:], -1), 1.0)
        beta = 1 - alpha_bar_t / alpha_bar_prev
        a, b, variance = posterior(alpha_bar_t, alpha_bar_prev, beta)
        variance = beta if self.variance_type == "fixed_large" else np.maximum(variance, MIN_VARIANCE)

        alpha, sigma = np.sqrt(alpha_bar_t), np.sqrt(1 - alpha_bar_t)
        p, q = prediction.x0(self.prediction_type, alpha, sigma)
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            **self.limits(self.clip_sample_range if self.clip_sample else None),
            a=a,
            b=b[:, np.newaxis],
            s=np.where(t > 0, np.sqrt(variance), 0),
            noise_draws=(t > 0).astype(np.int64),
            alpha=alpha,
            sigma=sigma,
        )


def posterior(
    alpha_bar_t: NDArray[np.float64], alpha_bar_prev: NDArray[np.float64], beta: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the weights of x_t and x0 in the mean of q(x_{t−1} | x_t, x0), and its variance (equations 6 and 7).

    Args:
        alpha_bar_t, alpha_bar_prev: ᾱ before and after a step.
        beta: 1 − alpha_bar_t / alpha_bar_prev, or the β of training that equals it.
    """
    a = np.sqrt(1 - beta) * (1 - alpha_bar_prev) / (1 - alpha_bar_t)
    b = np.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar_t)
    return a, b, beta * (1 - alpha_bar_prev) / (1 - alpha_bar_t)

"""UnCLIP: DDPM's step on a grid from the first timestep to the last (Ramesh et al. 2022, arXiv:2204.06125)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling import prediction
from latentrt.sampling.samplers.ddpm import MIN_VARIANCE, posterior
from latentrt.sampling.samplers.options import PositiveFloat, PositiveInt, Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import alpha_bar_at, alphas_cumprod, linspace_timesteps, training_betas

__all__ = ["UnCLIP"]


@dataclass(frozen=True, kw_only=True)
class UnCLIP(Sampler):
    """Each step leads to the next timestep of the grid, as in diffusers' UnCLIP pipelines."""

    title: ClassVar[str] = "unCLIP (Ramesh et al. 2022); DDPM on squared-cosine betas"
    class_name: ClassVar[str] = "UnCLIPScheduler"

    num_train_timesteps: PositiveInt = 1000
    variance_type: Literal["fixed_small_log"] = "fixed_small_log"
    clip_sample: bool = True
    clip_sample_range: PositiveFloat = 1.0
    prediction_type: Literal["epsilon", "sample"] = "epsilon"
    beta_schedule: Literal["squaredcos_cap_v2"] = "squaredcos_cap_v2"

    def table(self, steps: Steps) -> Schedule:
        if not 1 < steps.count <= self.num_train_timesteps:
            raise RequestError(
                f"`num_inference_steps`: got {steps.count}, expected 2 to {self.num_train_timesteps}; the grid "
                "includes the first and the last timestep"
            )
        betas = training_betas("squaredcos_cap_v2", 0, 0, self.num_train_timesteps)
        alpha_bar = alphas_cumprod(betas)
        t = linspace_timesteps(steps.count, self.num_train_timesteps).round().astype(np.int64)[steps.begin :]
        t_prev = np.append(t[1:], -1)
        alpha_bar_t, alpha_bar_prev = alpha_bar_at(alpha_bar, t, 1.0), alpha_bar_at(alpha_bar, t_prev, 1.0)
        # Between neighbours β itself, which is more exact than the quotient of float32 ᾱ.
        beta = np.where(t_prev == t - 1, betas[t].astype(np.float64), 1 - alpha_bar_t / alpha_bar_prev)
        a, b, variance = posterior(alpha_bar_t, alpha_bar_prev, beta)
        alpha, sigma = np.sqrt(alpha_bar_t), np.sqrt(1 - alpha_bar_t)
        p, q = prediction.x0(self.prediction_type, alpha, sigma)
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            limit=self.clip_sample_range if self.clip_sample else np.inf,
            a=a,
            b=b[:, np.newaxis],
            s=np.where(t > 0, np.sqrt(np.maximum(variance, MIN_VARIANCE)), 0),
            noise_draws=(t > 0).astype(np.int64),
            alpha=alpha,
            sigma=sigma,
        )

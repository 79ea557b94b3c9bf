"""TCD: trajectory consistency distillation (Zheng et al. 2024, https://arxiv.org/abs/2402.19159), algorithm 4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling import prediction, sigmas
from latentrt.sampling.samplers.lcm import Distilled
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["TCD"]


@dataclass(frozen=True, kw_only=True)
class TCD(Distilled):
    """A step goes along the trajectory to s = (1 − η)·t', beyond the next timestep t', and with noise back to that.

    Clipping, thresholding, timestep_spacing, steps_offset and timestep_scaling change nothing, as in diffusers. With
    `original_inference_steps` among the steps, diffusers takes every timestep of training for taught; so does this.
    """

    title: ClassVar[str] = "TCD, for models distilled to a few steps (Zheng et al. 2024); eta is its gamma"
    class_name: ClassVar[str] = "TCDScheduler"
    takes: ClassVar[frozenset[str]] = Distilled.takes | {"eta"}

    def table(self, steps: Steps) -> Schedule:
        eta = 0.3 if steps.eta is None else steps.eta
        if steps.original_inference_steps is None:
            taught = self.taught(steps)
        else:
            taught = np.arange(int(self.num_train_timesteps * steps.strength))
            if steps.count > steps.original_inference_steps:
                raise RequestError(
                    f"found {steps.count} steps, but the model was distilled on {steps.original_inference_steps} "
                    "(original_inference_steps); ask for at most that many"
                )
        t = self.grid(steps, taught)
        alpha_bar = self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr)
        following = np.append(t[1:], 0)
        beyond = np.floor(np.float32(1 - eta) * following.astype(np.float32)).astype(np.int64)  # in float32 as torch
        here, there, at_s = (sigmas.at_timesteps(alpha_bar, each, 1.0) for each in (t, following, beyond))
        last = np.arange(len(t)) == len(t) - 1
        noisy = ~last & (eta > 0)
        back = np.where(noisy, there / at_s, 1.0)

        alpha, sigma = np.sqrt(here), np.sqrt(1 - here)
        p, q = prediction.x0(self.prediction_type, alpha, sigma)
        p_epsilon, q_epsilon = prediction.epsilon(self.prediction_type, alpha, sigma)
        direction = np.sqrt(back * (1 - at_s))
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            a=direction * p_epsilon,
            d=direction * q_epsilon,
            b=np.sqrt(back * at_s)[:, np.newaxis],
            s=np.sqrt(1 - back),
            noise_draws=noisy.astype(np.int64),
            alpha=alpha,
            sigma=sigma,
        )

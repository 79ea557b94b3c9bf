"""DDIM from an image to its noise (Mokady et al. 2022, https://arxiv.org/abs/2211.09794): equation 12 of DDIM from less
noise to more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling import prediction
from latentrt.sampling.samplers.options import PositiveFloat, StepsOffset, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import alpha_bar_at, space_whole_timesteps

__all__ = ["DDIMInverse"]


@dataclass(frozen=True, kw_only=True)
class DDIMInverse(TrainedSampler):
    """Timesteps ascend. The model gets the timestep that a step leads to; its output is used as that at the start."""

    title: ClassVar[str] = "DDIM inverse, from an image to its noise"
    class_name: ClassVar[str] = "DDIMInverseScheduler"
    inverse: ClassVar[bool] = True

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing"] = "leading"
    steps_offset: StepsOffset = 0
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: PositiveFloat = 1.0

    def table(self, steps: Steps) -> Schedule:
        alpha_bar = self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr)
        grid = space_whole_timesteps(self.timestep_spacing, steps.count, self.num_train_timesteps, self.steps_offset)
        t = grid[::-1][steps.begin :]
        first = 1.0 if self.set_alpha_to_one else alpha_bar[0]
        before = np.minimum(t - self.num_train_timesteps // steps.count, self.num_train_timesteps - 1)
        alpha_bar_start = alpha_bar_at(alpha_bar, before, first)
        alpha_bar_end = alpha_bar_at(alpha_bar, t, first)
        if self.prediction_type == "sample" and not np.all(alpha_bar_start < 1):
            raise RequestError(
                "`prediction_type` 'sample' does not determine epsilon in a first step without noise; set "
                "`set_alpha_to_one` to false"
            )
        alpha, sigma = np.sqrt(alpha_bar_start), np.sqrt(1 - alpha_bar_start)
        p, q = prediction.x0(self.prediction_type, alpha, sigma)
        p_epsilon, q_epsilon = prediction.epsilon(self.prediction_type, alpha, sigma)
        direction = np.sqrt(1 - alpha_bar_end)
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            limit=self.clip_sample_range if self.clip_sample else np.inf,
            a=direction * p_epsilon,
            d=direction * q_epsilon,
            b=np.sqrt(alpha_bar_end)[:, np.newaxis],
            alpha=alpha,
            sigma=sigma,
        )

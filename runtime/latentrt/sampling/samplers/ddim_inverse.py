"""DDIM backwards: from a picture to the noise that it is drawn from (Mokady et al. 2022, arXiv:2211.09794).

It is DDIM's equation 12 from less noise to more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling import prediction, sigmas
from latentrt.sampling.samplers.options import PositiveFloat, StepsOffset, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["DDIMInverse"]


@dataclass(frozen=True, kw_only=True)
class DDIMInverse(TrainedSampler):
    """Timesteps ascend. The model is told where a step leads to, and its output is taken for that where it begins."""

    title: ClassVar[str] = "DDIM backwards, from a picture to its noise"
    class_name: ClassVar[str] = "DDIMInverseScheduler"
    backwards: ClassVar[bool] = True

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "trailing"] = "leading"
    steps_offset: StepsOffset = 0
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: PositiveFloat = 1.0

    def table(self, steps: Steps) -> Schedule:
        alpha_bar = self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr)
        grid = sigmas.whole_timesteps(self.timestep_spacing, steps.count, self.num_train_timesteps, self.steps_offset)
        t = grid[::-1][steps.begin :]
        first = 1.0 if self.set_alpha_to_one else alpha_bar[0]
        before = np.minimum(t - self.num_train_timesteps // steps.count, self.num_train_timesteps - 1)
        here = sigmas.at_timesteps(alpha_bar, before, first)
        there = sigmas.at_timesteps(alpha_bar, t, first)
        if self.prediction_type == "sample" and not np.all(here < 1):
            raise RequestError(
                "found prediction_type 'sample' and a first step without noise, where a picture says nothing of it; "
                "set set_alpha_to_one to false in the scheduler's configuration"
            )
        alpha, sigma = np.sqrt(here), np.sqrt(1 - here)
        p, q = prediction.x0(self.prediction_type, alpha, sigma)
        p_epsilon, q_epsilon = prediction.epsilon(self.prediction_type, alpha, sigma)
        direction = np.sqrt(1 - there)
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            limit=self.clip_sample_range if self.clip_sample else np.inf,
            a=direction * p_epsilon,
            d=direction * q_epsilon,
            b=np.sqrt(there)[:, np.newaxis],
            alpha=alpha,
            sigma=sigma,
        )

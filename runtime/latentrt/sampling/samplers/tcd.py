"""TCD: trajectory consistency distillation (Zheng et al. 2024, https://arxiv.org/abs/2402.19159), algorithm 4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling import prediction
from latentrt.sampling.samplers.lcm import Distilled
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import alpha_bar_at

__all__ = ["TCD"]


@dataclass(frozen=True, kw_only=True)
class TCD(Distilled):
    """A step follows the trajectory to s = (1 − η)·t', beyond the next timestep t', and returns to t' with noise.

    As in diffusers, with `original_inference_steps` given for a run, every timestep of training counts as one of
    distillation.
    """

    title: ClassVar[str] = "TCD, for models distilled to a few steps (Zheng et al. 2024); eta is its gamma"
    class_name: ClassVar[str] = "TCDScheduler"
    run_options: ClassVar[frozenset[str]] = Distilled.run_options | {"eta"}
    without_effect: ClassVar[Mapping[str, str]] = {
        **Distilled.without_effect,
        **dict.fromkeys(
            ("clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"),
            "the predicted image is not limited",
        ),
        "timestep_scaling": "of consistency models' boundary condition, which this has none of",
    }

    def table(self, steps: Steps) -> Schedule:
        eta = 0.3 if steps.eta is None else steps.eta
        if steps.original_inference_steps is None:
            distilled = self.distilled_timesteps(steps)
        else:
            distilled = np.arange(int(self.num_train_timesteps * steps.strength))
            if steps.count > steps.original_inference_steps:
                raise RequestError(
                    f"got {steps.count} steps (`num_inference_steps`), expected at most "
                    f"{steps.original_inference_steps} (`original_inference_steps`)"
                )
        t = self.timesteps(steps, distilled)
        alpha_bar = self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr)
        t_next = np.append(t[1:], 0)
        t_s = np.floor(np.float32(1 - eta) * t_next.astype(np.float32)).astype(np.int64)  # in float32 as torch
        alpha_bar_t, alpha_bar_next, alpha_bar_s = (alpha_bar_at(alpha_bar, each, 1.0) for each in (t, t_next, t_s))
        last = np.arange(len(t)) == len(t) - 1
        noisy = ~last & (eta > 0)
        back = np.where(noisy, alpha_bar_next / alpha_bar_s, 1.0)

        alpha, sigma = np.sqrt(alpha_bar_t), np.sqrt(1 - alpha_bar_t)
        p, q = prediction.x0(self.prediction_type, alpha, sigma)
        p_epsilon, q_epsilon = prediction.epsilon(self.prediction_type, alpha, sigma)
        direction = np.sqrt(back * (1 - alpha_bar_s))
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            a=direction * p_epsilon,
            d=direction * q_epsilon,
            b=np.sqrt(back * alpha_bar_s)[:, np.newaxis],
            s=np.sqrt(1 - back),
            noise_draws=noisy.astype(np.int64),
            alpha=alpha,
            sigma=sigma,
        )

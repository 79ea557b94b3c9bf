"""DDIM: denoising diffusion implicit models (Song, Meng, Ermon 2021, https://arxiv.org/abs/2010.02502)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.sampling import prediction
from latentrt.sampling.samplers.options import PositiveFloat, StepsOffset, Thresholding, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import TimestepSpacing, alpha_bar_at

__all__ = ["DDIM"]


@dataclass(frozen=True, kw_only=True)
class DDIM(Thresholding, TrainedSampler):
    """Equation 12: predict x0 and ε, clip x0 if so configured, and combine both with less noise."""

    title: ClassVar[str] = "DDIM (Song et al. 2021); eta adds noise"
    class_name: ClassVar[str] = "DDIMScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"eta"})

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: StepsOffset = 0
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: PositiveFloat = 1.0

    def table(self, steps: Steps) -> Schedule:
        alpha_bar = self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr)
        t = self.whole_timesteps(steps, self.timestep_spacing, self.steps_offset)
        final = 1.0 if self.set_alpha_to_one else alpha_bar[0]
        alpha_bar_t = alpha_bar_at(alpha_bar, t, final)
        alpha_bar_prev = alpha_bar_at(alpha_bar, t - self.num_train_timesteps // steps.count, final)

        # Equation 16: the standard deviation of the noise; the rest of the variance is along ε.
        eta = steps.eta or 0.0
        noise = eta * np.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_prev))
        direction = np.sqrt(np.maximum(1 - alpha_bar_prev - noise**2, 0))

        alpha, sigma = np.sqrt(alpha_bar_t), np.sqrt(1 - alpha_bar_t)
        p, q = prediction.x0(self.prediction_type, alpha, sigma)
        p_epsilon, q_epsilon = prediction.epsilon(self.prediction_type, alpha, sigma)
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            **self.limits(self.clip_sample_range if self.clip_sample else None),
            # ε is the model's, not the one that fits a clipped x0, so it bypasses y and comes from x and m.
            a=direction * p_epsilon,
            d=direction * q_epsilon,
            b=np.sqrt(alpha_bar_prev)[:, np.newaxis],
            s=noise,
            noise_draws=int(eta > 0),
            alpha=alpha,
            sigma=sigma,
        )

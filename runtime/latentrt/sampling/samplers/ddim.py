"""DDIM: denoising diffusion implicit models (Song, Meng, Ermon 2021, https://arxiv.org/abs/2010.02502)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.sampling import prediction, sigmas
from latentrt.sampling.samplers.options import Bounded, PositiveFloat, StepsOffset, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["DDIM"]


@dataclass(frozen=True, kw_only=True)
class DDIM(Bounded, TrainedSampler):
    """Equation 12: read x0 and ε off, clip x0 if so configured, and put both together again with less noise."""

    title: ClassVar[str] = "DDIM (Song et al. 2021); eta adds noise"
    class_name: ClassVar[str] = "DDIMScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"eta"})

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: sigmas.Spacing = "leading"
    steps_offset: StepsOffset = 0
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: PositiveFloat = 1.0

    def table(self, steps: Steps) -> Schedule:
        alpha_bar = self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr)
        t = self.whole_timesteps(steps, self.timestep_spacing, self.steps_offset)
        final = 1.0 if self.set_alpha_to_one else alpha_bar[0]
        here = sigmas.at_timesteps(alpha_bar, t, final)
        there = sigmas.at_timesteps(alpha_bar, t - self.num_train_timesteps // steps.count, final)

        # Equation 16: σ is the noise that is added, and the rest of the variance points back along ε.
        eta = steps.eta or 0.0
        added = eta * np.sqrt((1 - there) / (1 - here) * (1 - here / there))
        direction = np.sqrt(np.maximum(1 - there - added**2, 0))

        alpha, sigma = np.sqrt(here), np.sqrt(1 - here)
        p, q = prediction.x0(self.prediction_type, alpha, sigma)
        p_epsilon, q_epsilon = prediction.epsilon(self.prediction_type, alpha, sigma)
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            **self.bounds(self.clip_sample_range if self.clip_sample else None),
            # ε is that of the model, not the one that would fit a clipped x0: it goes around y through x and m.
            a=direction * p_epsilon,
            d=direction * q_epsilon,
            b=np.sqrt(there)[:, np.newaxis],
            s=added,
            noise_draws=int(eta > 0),
            alpha=alpha,
            sigma=sigma,
        )

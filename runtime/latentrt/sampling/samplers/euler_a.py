"""Ancestral sampling with Euler steps (`sample_euler_ancestral` of Katherine Crowson's k-diffusion)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling import prediction
from latentrt.sampling.samplers.k_diffusion import KDiffusion, init_noise_sigma, model_input_scale
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import drop_negative

__all__ = ["EulerAncestral"]


@dataclass(frozen=True, kw_only=True)
class EulerAncestral(KDiffusion):
    """An Euler step to σ_down, below the next σ', then fresh noise: σ'² = σ_down² + σ_up², σ_down = σ'² / σ."""

    title: ClassVar[str] = "Euler ancestral (k-diffusion); fresh noise at every step"
    class_name: ClassVar[str] = "EulerAncestralDiscreteScheduler"

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rescale_betas_zero_snr: bool = False

    def table(self, steps: Steps) -> Schedule:
        training = self.training(zero_snr=self.rescale_betas_zero_snr)
        t = drop_negative(self.timesteps(steps))[steps.begin :]
        sigma = np.interp(t, np.arange(len(training)), training).astype(np.float32).astype(np.float64)
        sigma_next = np.append(sigma[1:], 0.0)
        if np.any(sigma_next > sigma):
            raise RequestError(
                f"got {steps.count} steps (`num_inference_steps`), in which sigma rises (at zero SNR the first one is "
                f"capped at {sigma[0]:.0f}), expected descending sigmas; reduce the steps, or set `sampler` to euler"
            )
        ratio = (sigma_next / sigma) ** 2  # σ_down / σ

        p, q = prediction.x0(self.prediction_type, np.ones_like(sigma), sigma)
        return Schedule.of(
            t=t,
            c_in=model_input_scale(sigma),
            p=p,
            q=q,
            a=ratio,
            b=(1 - ratio)[:, np.newaxis],
            s=sigma_next * np.sqrt(1 - ratio),
            noise_draws=1,  # also in the last row, whose s is 0
            alpha=1.0,
            sigma=sigma,
            init_noise_sigma=init_noise_sigma(sigma[0], self.timestep_spacing),
        )

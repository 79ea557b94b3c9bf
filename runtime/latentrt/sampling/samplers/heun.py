"""Heun's method on the probability flow (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.sampling import prediction
from latentrt.sampling.samplers.k_diffusion import TwoStage, init_noise_sigma, interleave, model_input_scale
from latentrt.sampling.samplers.options import PositiveFloat
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["Heun"]


@dataclass(frozen=True, kw_only=True)
class Heun(TwoStage):
    """An Euler step, then the step repeated along the mean of dx/dσ at both its ends."""

    title: ClassVar[str] = "Heun (Karras et al. 2022), order 2"
    class_name: ClassVar[str] = "HeunDiscreteScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"timesteps"})

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp"] = "linear"  # type: ignore[assignment]  # more than its base
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"  # type: ignore[assignment]  # more than its base
    clip_sample: bool = False
    clip_sample_range: PositiveFloat = 1.0

    def table(self, steps: Steps) -> Schedule:
        t, sigmas = self.grid(steps, self.timesteps(steps), self.training())
        sigma, ratio = interleave(sigmas[:-1], sigmas[1:-1]), sigmas[1:] / sigmas[:-1]
        half = np.diff(sigmas)[:-1] / 2
        # The history holds x0; dx/dσ is (x − x0) / σ at both ends.
        start, end, none = half / sigmas[:-2], half / sigmas[1:-1], np.zeros(len(t))
        p, q = prediction.x0(self.prediction_type, np.ones_like(sigma), sigma)
        return Schedule.of(
            t=interleave(t, t[1:]),
            c_in=model_input_scale(sigma),
            p=p,
            q=q,
            limit=self.clip_sample_range if self.clip_sample else np.inf,
            a=interleave(ratio, end),
            e=interleave(none, 1 + start),
            b=np.stack([interleave(1 - ratio, -end), interleave(none, -start)], axis=1),
            alpha=1.0,
            sigma=sigma,
            init_noise_sigma=init_noise_sigma(sigmas[0], self.timestep_spacing),
        )

"""Heun's method on the probability flow (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.sampling import prediction
from latentrt.sampling.samplers.k_diffusion import TwoStage, init_noise_sigma, interleaved, model_scale
from latentrt.sampling.samplers.options import PositiveFloat
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["Heun"]


@dataclass(frozen=True, kw_only=True)
class Heun(TwoStage):
    """An Euler step, then the step anew along the mean of the slopes at both its ends."""

    title: ClassVar[str] = "Heun (Karras et al. 2022), order 2"
    class_name: ClassVar[str] = "HeunDiscreteScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"timesteps"})

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp"] = "linear"  # type: ignore[assignment]  # more than its base
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"  # type: ignore[assignment]  # more than its base
    clip_sample: bool = False
    clip_sample_range: PositiveFloat = 1.0

    def table(self, steps: Steps) -> Schedule:
        t, levels = self.grid(steps, self.told(steps), self.training())
        sigma, ratio = interleaved(levels[:-1], levels[1:-1]), levels[1:] / levels[:-1]
        half = np.diff(levels)[:-1] / 2
        along, along_there, none = half / levels[:-2], half / levels[1:-1], np.zeros(len(t))
        p, q = prediction.x0(self.prediction_type, np.ones_like(sigma), sigma)
        # What is remembered is x0; the slopes are (x − x0) / σ at both ends.
        return Schedule.of(
            t=interleaved(t, t[1:]),
            c_in=model_scale(sigma),
            p=p,
            q=q,
            limit=self.clip_sample_range if self.clip_sample else np.inf,
            a=interleaved(ratio, along_there),
            e=interleaved(none, 1 + along),
            b=np.stack([interleaved(1 - ratio, -along_there), interleaved(none, -along)], axis=1),
            alpha=1.0,
            sigma=sigma,
            init_noise_sigma=init_noise_sigma(levels[0], self.timestep_spacing),
        )

"""The linear multistep method on the probability flow (`sample_lms` of k-diffusion): Adams and Bashforth over σ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling.samplers.k_diffusion import RespacedKDiffusion, init_noise_sigma, slopes
from latentrt.sampling.samplers.lagrange import adams_weights
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["LMS"]


@dataclass(frozen=True, kw_only=True)
class LMS(RespacedKDiffusion):
    """x' = x + ∫ of the polynomial through the last slopes dx/dσ, of order 4 once there are as many."""

    title: ClassVar[str] = "LMS, Adams-Bashforth over sigma (k-diffusion), order 4"
    class_name: ClassVar[str] = "LMSDiscreteScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"order"})

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"

    def table(self, steps: Steps) -> Schedule:
        t, levels = self.grid(steps, self.told(steps), self.training())
        if np.any(np.diff(levels) == 0):
            raise RequestError("found two steps at the same noise level, expected all different; ask for fewer steps")
        b = np.zeros((len(t), min(steps.order, len(t))))
        for k in range(len(t)):
            order = min(k + 1, b.shape[1])
            remembered = levels[k::-1][:order]
            b[k, :order] = adams_weights(remembered[np.newaxis], levels[k : k + 1], levels[k + 1 : k + 2])[0]
        return Schedule.of(
            t=t,
            **slopes(self.prediction_type, levels[:-1]),
            a=1.0,
            b=b,
            alpha=1.0,
            sigma=levels[:-1],
            init_noise_sigma=init_noise_sigma(levels[0], self.timestep_spacing),
        )

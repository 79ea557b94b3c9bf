"""The linear multistep method on the probability flow (`sample_lms` of k-diffusion): Adams-Bashforth over σ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling.samplers.k_diffusion import SpacedKDiffusion, epsilon_columns, init_noise_sigma
from latentrt.sampling.samplers.multistep import adams_weights
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["LMS"]


@dataclass(frozen=True, kw_only=True)
class LMS(SpacedKDiffusion):
    """x' = x + ∫ of the polynomial through the last values of dx/dσ, of order 4 once the history has as many."""

    title: ClassVar[str] = "LMS, Adams-Bashforth over sigma (k-diffusion), order 4"
    class_name: ClassVar[str] = "LMSDiscreteScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"order"})

    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"

    def table(self, steps: Steps) -> Schedule:
        t, sigmas = self.grid(steps, self.timesteps(steps), self.training())
        if np.any(np.diff(sigmas) == 0):
            raise RequestError("two steps have the same sigma, expected distinct ones; reduce `num_inference_steps`")
        b = np.zeros((len(t), min(steps.order, len(t))))
        for k in range(len(t)):
            order = min(k + 1, b.shape[1])
            points = sigmas[k::-1][:order]
            b[k, :order] = adams_weights(points[np.newaxis], sigmas[k : k + 1], sigmas[k + 1 : k + 2])[0]
        return Schedule.of(
            t=t,
            **epsilon_columns(self.prediction_type, sigmas[:-1]),
            a=1.0,
            b=b,
            alpha=1.0,
            sigma=sigmas[:-1],
            init_noise_sigma=init_noise_sigma(sigmas[0], self.timestep_spacing),
        )

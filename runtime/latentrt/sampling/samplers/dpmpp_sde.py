"""DPM-Solver++ for the reverse SDE (`sample_dpmpp_sde` of Katherine Crowson's k-diffusion).

Its noise is a Brownian path over σ: a step's first stage adds the path's increment up to the middle, its second, which
begins where the first did, the increment of the whole step. So the second contains the first, and is

    z₂ = √r · z₁ + √(1 − r) · z,    r = (σ − σ_middle) / (σ − σ'),

with fresh z. Both earlier latents tell what z₁ was, so the rest of a path needs no more than a row has.

A seed's path is not that of diffusers, whose `torchsde` halves an interval again and again to find a value; what it is
a path of, and what a step makes of it, are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling import prediction, sigmas
from latentrt.sampling.samplers.k_diffusion import TwoStage, init_noise_sigma, interleaved, model_scale
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["DPMSolverSDE"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DPMSolverSDE(TwoStage):
    """Two ancestral steps in x0 from the same latent: to the middle of log σ, and with what is found there to σ'."""

    title: ClassVar[str] = "DPM-Solver++ SDE (k-diffusion); a Brownian path of noise"
    class_name: ClassVar[str] = "DPMSolverSDEScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"s_noise"})

    noise_sampler_seed: None = None

    def table(self, steps: Steps) -> Schedule:
        training, told = self.training(), self.told(steps)
        if steps.timesteps is None and self.timestep_spacing == "linspace":
            told = sigmas.linspace(steps.count, self.num_train_timesteps)  # this class alone has it in float64
        t, levels = self.grid(steps, told, training)
        here, there = levels[:-2], levels[1:-1]
        middle = np.sqrt(here * there)
        ratio_1, up_1 = _ancestral(here, middle, steps.s_noise)
        ratio_2, up_2 = _ancestral(here, there, steps.s_noise)
        share = (here - middle) / (here - there)
        # z₁ = (x_middle − ratio₁·x − (1 − ratio₁)·x0) / up₁, as the first stage has made x_middle.
        again = np.divide(up_2 * np.sqrt(share), up_1, out=np.zeros_like(up_1), where=up_1 > 0)

        sigma, none = interleaved(levels[:-1], middle), np.zeros(len(t))
        p, q = prediction.x0(self.prediction_type, np.ones_like(sigma), sigma)
        first = interleaved(np.append(1 - ratio_1, 1.0), 1 - ratio_2)
        second = interleaved(none, -again * (1 - ratio_1))
        return Schedule.of(
            t=interleaved(t, sigmas.timesteps_of_sigmas(middle, training)),
            c_in=model_scale(sigma),
            p=p,
            q=q,
            a=interleaved(np.append(ratio_1, 0.0), again),
            e=interleaved(none, ratio_2 - again * ratio_1),
            b=np.stack([first, second], axis=1),
            s=interleaved(np.append(up_1, 0.0), up_2 * np.sqrt(1 - share)),
            noise_draws=interleaved(np.append(np.ones(len(t) - 1), 0.0), 1.0).astype(np.int64),
            alpha=1.0,
            sigma=sigma,
            init_noise_sigma=init_noise_sigma(levels[0], self.timestep_spacing),
        )


def _ancestral(here: Float64s, there: Float64s, s_noise: float) -> tuple[Float64s, Float64s]:
    """Of a step from σ `here` to σ `there`: σ_down / σ, and how much noise is added."""
    up = np.minimum(there, there * np.sqrt(1 - (there / here) ** 2))
    return np.sqrt(there**2 - up**2) / here, s_noise * up

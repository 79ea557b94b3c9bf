"""DPM-Solver++ for the reverse SDE (`sample_dpmpp_sde` of Katherine Crowson's k-diffusion).

Its noise is a Brownian path over σ: the first stage of a step adds the path's increment up to the middle, the second,
which starts from the same latents, the increment of the whole step. So the second contains the first, and is

    z₂ = √r · z₁ + √(1 − r) · z,    r = (σ − σ_middle) / (σ − σ'),

with fresh z. z₁ follows from the latents of both stages, so a row can express the rest of the path.

A seed's path is not that of diffusers, whose `torchsde` bisects an interval to find a value; the distribution of the
path, and the use that a step makes of it, are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling import prediction
from latentrt.sampling.samplers.k_diffusion import TwoStage, init_noise_sigma, interleave, model_input_scale
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import linspace_timesteps, sigmas_to_timesteps

__all__ = ["DPMSolverSDE"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class DPMSolverSDE(TwoStage):
    """Two ancestral steps from the same latents: to the middle of log σ, and with x0 found there to σ'."""

    title: ClassVar[str] = "DPM-Solver++ SDE (k-diffusion); a Brownian path of noise"
    class_name: ClassVar[str] = "DPMSolverSDEScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"s_noise"})

    noise_sampler_seed: None = None

    def table(self, steps: Steps) -> Schedule:
        training, t = self.training(), self.timesteps(steps)
        if steps.timesteps is None and self.timestep_spacing == "linspace":
            t = linspace_timesteps(steps.count, self.num_train_timesteps)  # in diffusers float64 in this class alone
        t, sigmas = self.grid(steps, t, training)
        start, end = sigmas[:-2], sigmas[1:-1]
        middle = np.sqrt(start * end)
        ratio_1, up_1 = _ancestral_step(start, middle, steps.s_noise)
        ratio_2, up_2 = _ancestral_step(start, end, steps.s_noise)
        r = (start - middle) / (start - end)
        # z₁ = (x_middle − ratio₁·x − (1 − ratio₁)·x0) / up₁, by the first stage.
        of_z1 = np.divide(up_2 * np.sqrt(r), up_1, out=np.zeros_like(up_1), where=up_1 > 0)

        sigma, none = interleave(sigmas[:-1], middle), np.zeros(len(t))
        p, q = prediction.x0(self.prediction_type, np.ones_like(sigma), sigma)
        newest = interleave(np.append(1 - ratio_1, 1.0), 1 - ratio_2)
        older = interleave(none, -of_z1 * (1 - ratio_1))
        return Schedule.of(
            t=interleave(t, sigmas_to_timesteps(middle, training)),
            c_in=model_input_scale(sigma),
            p=p,
            q=q,
            a=interleave(np.append(ratio_1, 0.0), of_z1),
            e=interleave(none, ratio_2 - of_z1 * ratio_1),
            b=np.stack([newest, older], axis=1),
            s=interleave(np.append(up_1, 0.0), up_2 * np.sqrt(1 - r)),
            noise_draws=interleave(np.append(np.ones(len(t) - 1), 0.0), 1.0).astype(np.int64),
            alpha=1.0,
            sigma=sigma,
            init_noise_sigma=init_noise_sigma(sigmas[0], self.timestep_spacing),
        )


def _ancestral_step(start: Float64s, end: Float64s, s_noise: float) -> tuple[Float64s, Float64s]:
    """Return σ_down / σ and the standard deviation of the noise added, of steps from σ `start` to σ `end`."""
    up = np.minimum(end, end * np.sqrt(1 - (end / start) ** 2))
    return np.sqrt(end**2 - up**2) / start, s_noise * up

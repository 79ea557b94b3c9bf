"""LCM: latent consistency models (Luo et al. 2023, https://arxiv.org/abs/2310.04378), algorithm 3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import prediction, sigmas
from latentrt.sampling.samplers.options import Bounded, PositiveFloat, PositiveInt, StepsOffset, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["LCM", "Distilled"]

SIGMA_DATA = 0.5


@dataclass(frozen=True, kw_only=True)
class Distilled(Bounded, TrainedSampler):
    """A sampler for a model that was distilled on a grid of `original_inference_steps`, some of which it visits."""

    takes: ClassVar[frozenset[str]] = frozenset({"timesteps", "original_inference_steps", "strength"})

    beta_start: PositiveFloat = 0.00085
    beta_end: PositiveFloat = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    original_inference_steps: PositiveInt = 50
    clip_sample: bool = False
    clip_sample_range: PositiveFloat = 1.0
    set_alpha_to_one: bool = True
    steps_offset: StepsOffset = 0
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: sigmas.Spacing = "leading"
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False

    def grid(self, steps: Steps, taught: NDArray[Any]) -> NDArray[np.int64]:
        """The timesteps, of those that were taught."""
        if steps.timesteps is not None:
            grid = self.given_timesteps(steps, whole=True).astype(np.int64)
            if steps.strength < 1:
                raise RequestError(
                    f"found timesteps and strength {steps.strength:g}, expected one of them; leave out "
                    "the first timesteps"
                )
            return steps.rest(grid)
        if steps.count > len(taught):
            raise RequestError(
                f"found {steps.count} steps, but the model was distilled on {len(taught)} (original_inference_steps "
                "times strength); ask for at most that many"
            )
        visited = np.floor(np.linspace(0, len(taught), steps.count, endpoint=False)).astype(np.int64)
        return taught[::-1][visited][steps.begin :]

    def taught(self, steps: Steps) -> NDArray[np.int64]:
        """The timesteps of distillation, ascending, up to those of `strength`."""
        count = steps.original_inference_steps or self.original_inference_steps
        if count > self.num_train_timesteps:
            raise RequestError(
                f"found original_inference_steps {count}, expected at most the {self.num_train_timesteps} of training"
            )
        return np.arange(1, int(count * steps.strength) + 1) * (self.num_train_timesteps // count) - 1


@dataclass(frozen=True, kw_only=True)
class LCM(Distilled):
    """A step jumps to the picture, c_skip·x + c_out·x0, and puts fresh noise on it. timestep_spacing, steps_offset and
    set_alpha_to_one change nothing, as in diffusers."""

    title: ClassVar[str] = "LCM, for models distilled to a few steps (Luo et al. 2023)"
    class_name: ClassVar[str] = "LCMScheduler"

    def table(self, steps: Steps) -> Schedule:
        t = self.grid(steps, self.taught(steps))
        alpha_bar = self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr)
        here = sigmas.at_timesteps(alpha_bar, t, 1.0)
        last = np.arange(len(t)) == len(t) - 1
        there = np.where(last, 1.0, np.append(here[1:], 1.0))
        scaled = t.astype(np.float64) * self.timestep_scaling
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / np.hypot(scaled, SIGMA_DATA)
        alpha, sigma = np.sqrt(here), np.sqrt(1 - here)
        p, q = prediction.x0(self.prediction_type, alpha, sigma)
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            **self.bounds(self.clip_sample_range if self.clip_sample else None),
            u=c_skip,
            w=c_out,
            a=0.0,
            b=np.sqrt(there)[:, np.newaxis],
            s=np.sqrt(1 - there),
            noise_draws=(~last).astype(np.int64),
            alpha=alpha,
            sigma=sigma,
        )

"""LCM: latent consistency models (Luo et al. 2023, https://arxiv.org/abs/2310.04378), algorithm 3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import prediction
from latentrt.sampling.samplers.options import PositiveFloat, PositiveInt, StepsOffset, Thresholding, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import TimestepSpacing, alpha_bar_at

__all__ = ["LCM", "Distilled"]

SIGMA_DATA = 0.5


@dataclass(frozen=True, kw_only=True)
class Distilled(Thresholding, TrainedSampler):
    """A sampler for a model distilled on a grid of `original_inference_steps`, of which it visits some."""

    run_options: ClassVar[frozenset[str]] = frozenset({"timesteps", "original_inference_steps", "strength"})
    without_effect: ClassVar[Mapping[str, str]] = {
        "set_alpha_to_one": "no step looks before the first timestep",
        **dict.fromkeys(("timestep_spacing", "steps_offset"), "the timesteps are those of distillation"),
    }

    beta_start: PositiveFloat = 0.00085
    beta_end: PositiveFloat = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "scaled_linear"
    original_inference_steps: PositiveInt = 50
    clip_sample: bool = False
    clip_sample_range: PositiveFloat = 1.0
    set_alpha_to_one: bool = True
    steps_offset: StepsOffset = 0
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False

    def timesteps(self, steps: Steps, distilled: NDArray[Any]) -> NDArray[np.int64]:
        """Return the timesteps of a run, evenly chosen from those of distillation.

        Raises:
            RequestError: more steps than the model was distilled on, or timesteps given together with a strength.
        """
        if steps.timesteps is not None:
            t = self.given_timesteps(steps, whole=True).astype(np.int64)
            if steps.strength < 1:
                raise RequestError(
                    f"got `timesteps` and `strength`={steps.strength:g}, expected one of them; omit the first timesteps"
                )
            return steps.skip(t)
        if steps.count > len(distilled):
            raise RequestError(
                f"got {steps.count} steps (`num_inference_steps`), expected at most {len(distilled)} "
                "(`original_inference_steps` times `strength`)"
            )
        chosen = np.floor(np.linspace(0, len(distilled), steps.count, endpoint=False)).astype(np.int64)
        return distilled[::-1][chosen][steps.begin :]

    def distilled_timesteps(self, steps: Steps) -> NDArray[np.int64]:
        """Return the timesteps of distillation, ascending, up to those of `strength`."""
        count = steps.original_inference_steps or self.original_inference_steps
        if count > self.num_train_timesteps:
            raise RequestError(
                f"`original_inference_steps`: got {count}, expected at most {self.num_train_timesteps} "
                "(`num_train_timesteps`)"
            )
        return np.arange(1, int(count * steps.strength) + 1) * (self.num_train_timesteps // count) - 1


@dataclass(frozen=True, kw_only=True)
class LCM(Distilled):
    """A step predicts the image, c_skip·x + c_out·x0, and adds fresh noise to it."""

    title: ClassVar[str] = "LCM, for models distilled to a few steps (Luo et al. 2023)"
    class_name: ClassVar[str] = "LCMScheduler"

    def table(self, steps: Steps) -> Schedule:
        t = self.timesteps(steps, self.distilled_timesteps(steps))
        alpha_bar = self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr)
        alpha_bar_t = alpha_bar_at(alpha_bar, t, 1.0)
        last = np.arange(len(t)) == len(t) - 1
        alpha_bar_next = np.where(last, 1.0, np.append(alpha_bar_t[1:], 1.0))
        scaled = t.astype(np.float64) * self.timestep_scaling
        c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        c_out = scaled / np.hypot(scaled, SIGMA_DATA)
        alpha, sigma = np.sqrt(alpha_bar_t), np.sqrt(1 - alpha_bar_t)
        p, q = prediction.x0(self.prediction_type, alpha, sigma)
        return Schedule.of(
            t=t,
            p=p,
            q=q,
            **self.limits(self.clip_sample_range if self.clip_sample else None),
            u=c_skip,
            w=c_out,
            a=0.0,
            b=np.sqrt(alpha_bar_next)[:, np.newaxis],
            s=np.sqrt(1 - alpha_bar_next),
            noise_draws=(~last).astype(np.int64),
            alpha=alpha,
            sigma=sigma,
        )

"""The base of samplers over σ (Karras et al. 2022), whose latents x0 + σ·ε are not scaled to unit variance.

A step follows dx/dσ = ε from one σ to the next. The grid and the names are those of Katherine Crowson's k-diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling import prediction
from latentrt.sampling.samplers.options import PlainBetas, PositiveFloat, SigmaSpacing, StepsOffset, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import (
    SIGMA_SPACINGS,
    TimestepSpacing,
    drop_negative,
    sigmas_to_timesteps,
    space_timesteps,
    training_sigmas,
)

__all__ = [
    "MAX_CHURN",
    "KDiffusion",
    "SpacedKDiffusion",
    "TwoStage",
    "add_churn",
    "epsilon_columns",
    "init_noise_sigma",
    "interleave",
    "midpoint_schedule",
    "model_input_scale",
]

Float64s = NDArray[np.float64]
MAX_CHURN = 2**0.5 - 1


@dataclass(frozen=True, kw_only=True)
class KDiffusion(TrainedSampler):
    """A sampler over σ of training."""

    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: StepsOffset = 0

    def training(self, *, zero_snr: bool = False) -> NDArray[np.float32]:
        """Return σ of each training timestep, float32, ascending."""
        return training_sigmas(self.alphas_cumprod(zero_snr=zero_snr))

    def timesteps(self, steps: Steps) -> Float64s:
        """Return the timesteps of all steps before sigmas are spaced anew: float32 values, possibly one of −1."""
        if steps.timesteps is not None:
            return self.given_timesteps(steps, whole=False).astype(np.float32).astype(np.float64)
        t = space_timesteps(self.timestep_spacing, steps.count, self.num_train_timesteps, self.steps_offset)
        return t.astype(np.float32).astype(np.float64)  # diffusers interpolates at float32 timesteps


@dataclass(frozen=True, kw_only=True)
class SpacedKDiffusion(SigmaSpacing, KDiffusion):
    """A sampler over σ of training whose sigmas can be spaced anew."""

    def grid(
        self, steps: Steps, t: Float64s, training: NDArray[np.float32], *, whole: bool = False
    ) -> tuple[Float64s, Float64s]:
        """Return timesteps [N] and σ [N + 1] from `begin` on, the last of which is 0.

        σ are float32 values in float64.

        Args:
            steps: the options of the run.
            t: the timesteps of all steps.
            training: σ of each training timestep.
            whole: whether timesteps of the Karras spacing are rounded.
        """
        self.reject_given_grid(steps)
        sigmas, t = np.interp(t, np.arange(len(training)), training), drop_negative(t)
        if self.sigma_spacing:
            sigmas = SIGMA_SPACINGS[self.sigma_spacing](sigmas[0], sigmas[-1], steps.count)
            t = sigmas_to_timesteps(sigmas, training)
            t = t.round() if whole and self.sigma_spacing == "karras" else t
        sigmas = np.append(sigmas[: len(t)], 0.0).astype(np.float32).astype(np.float64)
        return t[steps.begin :], sigmas[steps.begin :]


@dataclass(frozen=True, kw_only=True)
class TwoStage(SpacedKDiffusion):
    """A sampler with two model evaluations per step, except in the last, which goes to σ = 0 in one."""

    beta_start: PositiveFloat = 0.00085
    beta_end: PositiveFloat = 0.012
    beta_schedule: PlainBetas = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"

    def evaluations(self, count: int) -> int:
        return 2 * count - 1


def interleave(first: Float64s, second: Float64s | float) -> Float64s:
    """Return a column of two-stage steps: first stages [N], and between them second stages [N − 1]; [2N − 1]."""
    column = np.empty(2 * len(first) - 1)
    column[0::2], column[1::2] = first, second
    return column


def midpoint_schedule(
    sampler: TwoStage,
    t: Float64s,
    sigmas: Float64s,
    middle: Float64s,
    end: Float64s,
    noise: Float64s | float,
    training: NDArray[np.float32],
) -> Schedule:
    """Return the schedule of a midpoint method: a step to an intermediate σ, then the whole step with dx/dσ from there.

    Args:
        sampler: the sampler.
        t, sigmas: timesteps [N], and σ at each of them and after the last [N + 1].
        middle: σ in the middle of each step but the last, [N − 1].
        end: σ at the end of each step but the last, before noise is added, [N − 1].
        noise: standard deviation of the noise added then, [N − 1]; a number if the sampler is deterministic.
        training: σ of each training timestep.
    """
    ratio = np.append(middle, 0.0) / sigmas[:-1]
    slope, none = (end - sigmas[:-2]) / middle, np.zeros(len(t))
    sigma = interleave(sigmas[:-1], middle)
    p, q = prediction.x0(sampler.prediction_type, np.ones_like(sigma), sigma)
    return Schedule.of(
        t=interleave(t, sigmas_to_timesteps(middle, training)),
        c_in=model_input_scale(sigma),
        p=p,
        q=q,
        a=interleave(ratio, slope),
        e=interleave(none, 1.0),
        b=interleave(1 - ratio, -slope)[:, np.newaxis],
        s=interleave(none, noise),
        noise_draws=interleave(none, 0.0 if isinstance(noise, float) else 1.0).astype(np.int64),
        alpha=1.0,
        sigma=sigma,
        init_noise_sigma=init_noise_sigma(sigmas[0], sampler.timestep_spacing),
    )


def epsilon_columns(kind: prediction.PredictionType, sigma: Float64s) -> dict[str, Any]:
    """Return the columns of a solver whose history is dx/dσ = ε."""
    p, q = prediction.epsilon(kind, np.ones_like(sigma), sigma)
    return {"p": p, "q": q, "c_in": model_input_scale(sigma)}


def model_input_scale(sigma: Float64s) -> Float64s:
    """Return c_in, which scales the latents to unit variance."""
    return 1 / np.hypot(sigma, 1)


def init_noise_sigma(sigma_max: float, spacing: TimestepSpacing) -> float:
    """Return the factor of the initial noise; as in diffusers, √(σ² + 1) with leading spacing and σ otherwise."""
    return float(np.hypot(sigma_max, 1)) if spacing == "leading" else float(sigma_max)


def add_churn(sigma: Float64s, steps: Steps, count: int) -> Float64s:
    """Return σ̂, to which fresh noise raises σ at the start of each step (Karras et al. 2022, algorithm 2, line 5).

    Args:
        sigma: σ of each step.
        steps: for `s_churn`, `s_tmin` and `s_tmax`.
        count: the number of steps that share `s_churn`.
    """
    gamma = min(steps.s_churn / count, MAX_CHURN)
    return np.where((steps.s_tmin <= sigma) & (sigma <= steps.s_tmax), sigma * (1 + gamma), sigma)

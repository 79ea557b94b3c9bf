"""What do the samplers after Karras et al. 2022 have in common?

Their latents are x0 + σ·ε, not scaled to unit variance; a step follows dx/dσ = ε from one σ to the next. The grid and
the names are those of Katherine Crowson's k-diffusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling import prediction, sigmas
from latentrt.sampling.samplers.options import PlainBetas, PositiveFloat, Respaced, StepsOffset, TrainedSampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = [
    "MAX_CHURN",
    "KDiffusion",
    "RespacedKDiffusion",
    "TwoStage",
    "churned",
    "init_noise_sigma",
    "interleaved",
    "midpoint_table",
    "model_scale",
    "slopes",
]

Float64s = NDArray[np.float64]
MAX_CHURN = 2**0.5 - 1


@dataclass(frozen=True, kw_only=True)
class KDiffusion(TrainedSampler):
    """A sampler over the σ of training."""

    timestep_spacing: sigmas.Spacing = "linspace"
    steps_offset: StepsOffset = 0

    def training(self, *, zero_snr: bool = False) -> NDArray[np.float32]:
        """The σ of each training timestep, float32, ascending."""
        return sigmas.sigmas(self.alphas_cumprod(zero_snr=zero_snr))

    def told(self, steps: Steps) -> Float64s:
        """The timesteps of all steps before levels are spread anew: float32 values, and maybe one of −1."""
        if steps.timesteps is not None:
            return self.given_timesteps(steps, whole=False).astype(np.float32).astype(np.float64)
        grid = sigmas.timesteps(self.timestep_spacing, steps.count, self.num_train_timesteps, self.steps_offset)
        return grid.astype(np.float32).astype(np.float64)  # as diffusers interpolates at it


@dataclass(frozen=True, kw_only=True)
class RespacedKDiffusion(Respaced, KDiffusion):
    """One whose levels can be spread anew."""

    def grid(
        self, steps: Steps, told: Float64s, training: NDArray[np.float32], *, whole: bool = False
    ) -> tuple[Float64s, Float64s]:
        """Timesteps [N] and the levels at each of them and after the last, where it is 0 [N + 1]; from `begin` on.

        Levels are float32 values in float64.

        Args:
            steps: what is asked.
            told: the timesteps.
            training: the σ of each training timestep.
            whole: whether a Karras grid's timesteps are rounded.
        """
        self.check_custom(steps)
        levels, t = np.interp(told, np.arange(len(training)), training), sigmas.visited(told)
        if self.respacing:
            levels = sigmas.RESPACED[self.respacing](levels[0], levels[-1], steps.count)
            t = sigmas.timesteps_of_sigmas(levels, training)
            t = t.round() if whole and self.respacing == "karras" else t
        levels = np.append(levels[: len(t)], 0.0).astype(np.float32).astype(np.float64)
        return t[steps.begin :], levels[steps.begin :]


@dataclass(frozen=True, kw_only=True)
class TwoStage(RespacedKDiffusion):
    """One that asks the model twice in a step, except in the last, which goes to σ = 0 at once."""

    beta_start: PositiveFloat = 0.00085
    beta_end: PositiveFloat = 0.012
    beta_schedule: PlainBetas = "linear"
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"

    def evaluations(self, count: int) -> int:
        return 2 * count - 1


def interleaved(first: Float64s, second: Float64s | float) -> Float64s:
    """A column of two stages: the N steps' first stages, and between them the second of all steps but the last."""
    column = np.empty(2 * len(first) - 1)
    column[0::2], column[1::2] = first, second
    return column


def midpoint_table(
    sampler: TwoStage,
    t: Float64s,
    levels: Float64s,
    middle: Float64s,
    end: Float64s,
    noise: Float64s | float,
    training: NDArray[np.float32],
) -> Schedule:
    """A step to a level in between, then the whole step along the slope found there: (x − x0) / σ.

    Args:
        sampler: whose table it is.
        t, levels: timesteps [N], σ at each of them and after the last [N + 1].
        middle: σ in the middle of each step but the last, [N − 1].
        end: σ to which the slope leads, [N − 1].
        noise: how much is added then, [N − 1]; a number if none is ever drawn.
        training: the σ of each training timestep.
    """
    first = np.append(middle, 0.0) / levels[:-1]
    along, none = (end - levels[:-2]) / middle, np.zeros(len(t))
    sigma = interleaved(levels[:-1], middle)
    p, q = prediction.x0(sampler.prediction_type, np.ones_like(sigma), sigma)
    return Schedule.of(
        t=interleaved(t, sigmas.timesteps_of_sigmas(middle, training)),
        c_in=model_scale(sigma),
        p=p,
        q=q,
        a=interleaved(first, along),
        e=interleaved(none, 1.0),
        b=interleaved(1 - first, -along)[:, np.newaxis],
        s=interleaved(none, noise),
        noise_draws=interleaved(none, 0.0 if isinstance(noise, float) else 1.0).astype(np.int64),
        alpha=1.0,
        sigma=sigma,
        init_noise_sigma=init_noise_sigma(levels[0], sampler.timestep_spacing),
    )


def slopes(kind: prediction.PredictionType, sigma: Float64s) -> dict[str, Any]:
    """The columns that remember dx/dσ = ε."""
    p, q = prediction.epsilon(kind, np.ones_like(sigma), sigma)
    return {"p": p, "q": q, "c_in": model_scale(sigma)}


def model_scale(sigma: Float64s) -> Float64s:
    """What the model is shown: the latent scaled to unit variance."""
    return 1 / np.hypot(sigma, 1)


def init_noise_sigma(sigma_max: float, spacing: sigmas.Spacing) -> float:
    """What the first latent's noise is multiplied by; as in diffusers only the leading grid counts the picture."""
    return float(np.hypot(sigma_max, 1)) if spacing == "leading" else float(sigma_max)


def churned(sigma: Float64s, steps: Steps, count: int) -> Float64s:
    """The level that each step first raises its own to, by fresh noise (Karras et al. 2022, algorithm 2, line 5).

    `count` is how many steps share `s_churn`.
    """
    gamma = min(steps.s_churn / count, MAX_CHURN)
    return np.where((steps.s_tmin <= sigma) & (sigma <= steps.s_tmax), sigma * (1 + gamma), sigma)

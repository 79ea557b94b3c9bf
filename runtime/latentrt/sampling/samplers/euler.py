"""Euler's method on the probability flow (Karras et al. 2022, https://arxiv.org/abs/2206.00364, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import prediction
from latentrt.sampling.samplers.k_diffusion import KDiffusion, add_churn, init_noise_sigma, model_input_scale
from latentrt.sampling.samplers.options import PositiveFloat, SigmaSpacing
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import (
    SIGMA_SPACINGS,
    check_sigma_range,
    drop_negative,
    linspace_float32,
    sigmas_to_timesteps,
)

__all__ = ["Euler", "euler_columns"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Euler(SigmaSpacing, KDiffusion):
    """x' = x0 + (σ' / σ)(x − x0) with x = x0 + σ·ε; `s_churn` adds noise (algorithm 2)."""

    title: ClassVar[str] = "Euler (Karras et al. 2022)"
    class_name: ClassVar[str] = "EulerDiscreteScheduler"
    run_options: ClassVar[frozenset[str]] = frozenset({"timesteps", "sigmas", "s_churn", "s_tmin", "s_tmax", "s_noise"})
    sigmas_end: ClassVar[int] = 1

    prediction_type: Literal["epsilon", "v_prediction", "sample", "original_sample"] = "epsilon"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    rescale_betas_zero_snr: bool = False
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    sigma_min: PositiveFloat | None = None
    sigma_max: PositiveFloat | None = None

    def table(self, steps: Steps) -> Schedule:
        t, sigmas = self._grid(steps, self.training(zero_snr=self.rescale_betas_zero_snr))
        if self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            t = 0.25 * np.log(sigmas[:-1])
        # diffusers splits s_churn among its sigmas, of which logarithmic interpolation leaves one too many.
        shares = len(t) + (self.interpolation_type == "log_linear" and not self.sigma_spacing and steps.sigmas is None)
        t, sigmas = t[steps.begin :], sigmas[steps.begin :]
        sigma, predicted = sigmas[:-1], self.prediction_type
        if predicted == "original_sample":
            predicted = "sample"
        sigma_hat = add_churn(sigma, steps, shares)
        # As in diffusers, ε is converted with σ̂, and v with the σ before noise was added.
        p, q = prediction.x0(predicted, np.ones_like(sigma), sigma_hat if predicted == "epsilon" else sigma)
        return Schedule.of(
            t=t,
            c_in=model_input_scale(sigma),
            p=p,
            q=q,
            **euler_columns(sigmas, sigma_hat, p, steps),
            alpha=1.0,
            sigma=sigma,
            init_noise_sigma=init_noise_sigma(sigmas[:-1].max(), self.timestep_spacing),
        )

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[Float64s, Float64s]:
        """Return timesteps [N] and σ at each of them and after the last [N + 1], float32 values in float64."""
        self.reject_given_grid(steps)
        if steps.sigmas is not None and len(steps.sigmas) < 2:
            raise RequestError("got 1 value in `sigmas`, expected at least 2; the last one is the end of the last step")
        if steps.sigmas is not None:
            given = np.array(steps.sigmas, np.float32).astype(np.float64)
            return sigmas_to_timesteps(given[:-1], training), given
        if steps.timesteps and self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            raise RequestError("got `timesteps` with `timestep_type` 'continuous'; set `sigmas` instead")
        t, final = self.timesteps(steps), 0.0 if self.final_sigmas_type == "zero" else training[0]
        if self.interpolation_type == "linear":
            sigmas = np.interp(t, np.arange(len(training)), training)
        else:
            # One more σ than there are steps: unless spaced anew, the grid ends at it and not at `final`.
            high, low = np.log(training[[-1, 0]])
            sigmas = np.exp(linspace_float32(high, low, steps.count + 1).astype(np.float64))
            sigmas = sigmas.astype(np.float32).astype(np.float64)
        t = drop_negative(t)
        if self.sigma_spacing:
            high, low = self.sigma_max or sigmas[0], self.sigma_min or sigmas[-1]
            if len(sigmas) > 1:
                check_sigma_range(low, high)
            sigmas = SIGMA_SPACINGS[self.sigma_spacing](high, low, steps.count)
            t = sigmas_to_timesteps(sigmas, training)
        elif self.interpolation_type == "linear":
            sigmas = sigmas[: len(t)]
        return t, np.append(sigmas, final)[: len(t) + 1].astype(np.float32).astype(np.float64)


def euler_columns(sigmas: Float64s, sigma_hat: Float64s, p: Float64s, steps: Steps) -> dict[str, Any]:
    """Return the columns a, b and s of x' = x̂ + (σ' − σ̂)(x̂ − x0(x̂)) / σ̂, where x̂ is x with noise added up to σ̂.

    Args:
        sigmas: σ at every row and after the last, [N + 1].
        sigma_hat: σ̂ at every row, [N].
        p: the factor of x in x0.
        steps: for `s_noise`.
    """
    ratio = sigmas[1:] / sigma_hat
    noise = steps.s_noise * np.sqrt(sigma_hat**2 - sigmas[:-1] ** 2)
    return {
        "a": ratio,
        "b": (1 - ratio)[:, np.newaxis],
        "s": (ratio + (1 - ratio) * p) * noise,
        "noise_draws": (sigma_hat > sigmas[:-1]).astype(np.int64),
    }

"""Euler's method on the probability flow (Karras et al. 2022, https://arxiv.org/abs/2206.00364, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import prediction, sigmas
from latentrt.sampling.samplers.k_diffusion import KDiffusion, churned, init_noise_sigma, model_scale
from latentrt.sampling.samplers.options import PositiveFloat, Respaced
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["Euler", "euler_columns"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Euler(Respaced, KDiffusion):
    """x' = x0 + (σ' / σ)(x − x0), with x = x0 + σ·ε not scaled to unit variance; s_churn adds noise (algorithm 2)."""

    title: ClassVar[str] = "Euler (Karras et al. 2022)"
    class_name: ClassVar[str] = "EulerDiscreteScheduler"
    takes: ClassVar[frozenset[str]] = frozenset({"timesteps", "sigmas", "s_churn", "s_tmin", "s_tmax", "s_noise"})
    sigmas_end: ClassVar[int] = 1

    prediction_type: Literal["epsilon", "v_prediction", "sample", "original_sample"] = "epsilon"
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    rescale_betas_zero_snr: bool = False
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    sigma_min: PositiveFloat | None = None
    sigma_max: PositiveFloat | None = None

    def table(self, steps: Steps) -> Schedule:
        t, levels = self._grid(steps, self.training(zero_snr=self.rescale_betas_zero_snr))
        if self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            t = 0.25 * np.log(levels[:-1])
        # diffusers shares s_churn out over its levels, of which logarithmic interpolation leaves one too many.
        shares = len(t) + (self.interpolation_type == "log_linear" and not self.respacing and steps.sigmas is None)
        t, levels = t[steps.begin :], levels[steps.begin :]
        sigma, predicted = levels[:-1], self.prediction_type
        if predicted == "original_sample":
            predicted = "sample"
        raised = churned(sigma, steps, shares)
        # The raised latent is read with the level it has; v is that of the unit-norm latent before, as in diffusers.
        p, q = prediction.x0(predicted, np.ones_like(sigma), raised if predicted == "epsilon" else sigma)
        return Schedule.of(
            t=t,
            c_in=model_scale(sigma),
            p=p,
            q=q,
            **euler_columns(levels, raised, p, steps),
            alpha=1.0,
            sigma=sigma,
            init_noise_sigma=init_noise_sigma(levels[:-1].max(), self.timestep_spacing),
        )

    def _grid(self, steps: Steps, training: NDArray[np.float32]) -> tuple[Float64s, Float64s]:
        """Timesteps [N], and the noise levels at each of them and after the last [N + 1]: float32 values in float64."""
        self.check_custom(steps)
        if steps.sigmas is not None and len(steps.sigmas) < 2:
            raise RequestError("found 1 sigma, expected at least 2: the last is where the last step ends")
        if steps.sigmas is not None:
            given = np.array(steps.sigmas, np.float32).astype(np.float64)
            return sigmas.timesteps_of_sigmas(given[:-1], training), given
        if steps.timesteps and self.timestep_type == "continuous" and self.prediction_type == "v_prediction":
            raise RequestError("found timesteps and timestep_type 'continuous', where levels decide; give sigmas")
        told, final = self.told(steps), 0.0 if self.final_sigmas_type == "zero" else training[0]
        t = sigmas.visited(told)
        if self.interpolation_type == "linear":
            levels = np.interp(told, np.arange(len(training)), training)
        else:
            # One level more than there are steps: unless the levels are spread anew, it ends there and not at `final`.
            high, low = np.log(training[[-1, 0]])
            levels = np.exp(sigmas.linspace_float32(high, low, steps.count + 1).astype(np.float64))
            levels = levels.astype(np.float32).astype(np.float64)
        if self.respacing:
            high, low = self.sigma_max or levels[0], self.sigma_min or levels[-1]
            if len(levels) > 1:
                sigmas.check_ends(low, high)
            levels = sigmas.RESPACED[self.respacing](high, low, steps.count)
            t = sigmas.timesteps_of_sigmas(levels, training)
        elif self.interpolation_type == "linear":
            levels = levels[: len(t)]
        return t, np.append(levels, final)[: len(t) + 1].astype(np.float32).astype(np.float64)


def euler_columns(levels: Float64s, raised: Float64s, p: Float64s, steps: Steps) -> dict[str, Any]:
    """The columns a, b and s of x' = x̂ + (σ' − σ̂)(x̂ − x0(x̂)) / σ̂, where x̂ is x raised to σ̂ by noise.

    Args:
        levels: σ at every row and after the last, [N + 1].
        raised: σ̂ at every row, [N].
        p: how much of x is in x0.
        steps: for `s_noise`.
    """
    ratio = levels[1:] / raised
    added = steps.s_noise * np.sqrt(raised**2 - levels[:-1] ** 2)
    return {
        "a": ratio,
        "b": (1 - ratio)[:, np.newaxis],
        "s": (ratio + (1 - ratio) * p) * added,
        "noise_draws": (raised > levels[:-1]).astype(np.int64),
    }

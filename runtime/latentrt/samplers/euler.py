"""Euler's method on the probability flow (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt import prediction, sigmas
from latentrt.samplers.options import PositiveFloat, Sampler
from latentrt.schedule import Schedule

__all__ = ["Euler", "init_noise_sigma"]


@dataclass(frozen=True, kw_only=True)
class Euler(Sampler):
    """x' = x0 + (σ' / σ)(x − x0), with x = x0 + σ·ε not scaled to unit variance."""

    title: ClassVar[str] = "Euler (Karras et al. 2022)"
    class_name: ClassVar[str] = "EulerDiscreteScheduler"

    prediction_type: Literal["epsilon", "v_prediction", "sample", "original_sample"] = "epsilon"
    timestep_spacing: sigmas.Spacing = "linspace"
    timestep_type: Literal["discrete"] = "discrete"
    rescale_betas_zero_snr: bool = False
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: Literal[False] = False
    use_beta_sigmas: Literal[False] = False
    sigma_min: PositiveFloat | None = None
    sigma_max: PositiveFloat | None = None

    def schedule(self, num_inference_steps: int, eta: float = 0.0) -> Schedule:
        training = sigmas.sigmas(self.alphas_cumprod(zero_snr=self.rescale_betas_zero_snr))
        t, levels = self._grid(num_inference_steps, training)
        sigma, ratio = levels[:-1], levels[1:] / levels[:-1]

        predicted: prediction.PredictionType = (
            "sample" if self.prediction_type == "original_sample" else self.prediction_type
        )
        p, q = prediction.x0(predicted, np.ones_like(sigma), sigma)
        return Schedule.of(
            t=t,
            c_in=1 / np.hypot(sigma, 1),
            p=p,
            q=q,
            a=ratio,
            b=(1 - ratio)[:, np.newaxis],
            alpha=1.0,
            sigma=sigma,
            init_noise_sigma=init_noise_sigma(sigma[0], self.timestep_spacing),
        )

    def _grid(self, count: int, training: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Timesteps [N], and the noise levels at each of them and after the last [N + 1]: float32 values in float64."""
        grid = sigmas.timesteps(self.timestep_spacing, count, self.num_train_timesteps, self.steps_offset)
        grid = grid.astype(np.float32)  # as it is told the model, and as diffusers interpolates at it
        t, final = sigmas.visited(grid), 0.0 if self.final_sigmas_type == "zero" else training[0]
        if self.interpolation_type == "linear":
            levels = np.interp(grid, np.arange(len(training)), training)
        else:
            # One level more than there are steps: unless Karras' grid replaces it, it ends there and not at `final`.
            high, low = np.log(training[[-1, 0]])
            levels = np.exp(sigmas.linspace_float32(high, low, count + 1).astype(np.float64))
            levels = levels.astype(np.float32).astype(np.float64)
        if self.use_karras_sigmas:
            levels = sigmas.karras(self.sigma_max or levels[0], self.sigma_min or levels[-1], count)
            t = sigmas.timesteps_of_sigmas(levels, training)
        elif self.interpolation_type == "linear":
            levels = levels[: len(t)]
        return t, np.append(levels, final)[: len(t) + 1].astype(np.float32).astype(np.float64)


def init_noise_sigma(sigma_max: float, spacing: sigmas.Spacing) -> float:
    """What the first latent's noise is multiplied by; as in diffusers only the leading grid counts the picture."""
    return float(np.hypot(sigma_max, 1)) if spacing == "leading" else sigma_max

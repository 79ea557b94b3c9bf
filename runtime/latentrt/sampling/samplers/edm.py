"""The preconditioning and the grid of EDM models (Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1).

The network gets c_in·x at c_noise = log(σ) / 4, and x0 = c_skip·x + c_out·m. The latents are x0 + σ·ε.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.samplers.options import Kind, PositiveFloat, PositiveInt, Sampler
from latentrt.sampling.sigmas import check_sigma_range, linspace_float32

__all__ = ["EDM"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EDM(Sampler):
    """A sampler for EDM models. `v_prediction` changes the sign of c_out, as in diffusers."""

    kind: ClassVar[Kind] = "edm"
    without_effect: ClassVar[Mapping[str, str]] = {"num_train_timesteps": "timesteps are those of sigma"}

    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    sigma_data: PositiveFloat = 0.5
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    num_train_timesteps: PositiveInt = 1000
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rho: PositiveFloat = 7.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def sigmas(self, ramp: NDArray[np.floating[Any]]) -> Float64s:
        """Return descending σ, float32 values in float64.

        Args:
            ramp: 0 … 1, [N]; the Karras spacing is computed in its precision.
        """
        check_sigma_range(self.sigma_min, self.sigma_max)
        if self.sigma_schedule == "exponential":
            c_noises = linspace_float32(math.log(self.sigma_min), math.log(self.sigma_max), len(ramp))
            ascending: Float64s = np.exp(c_noises.astype(np.float64)).astype(np.float32).astype(np.float64)
            return ascending[::-1]
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        root = (high + ramp * ramp.dtype.type(low - high)).astype(ramp.dtype)
        sigmas: Float64s = (root.astype(np.float64) ** self.rho).astype(np.float32).astype(np.float64)
        return sigmas

    def x0(self, sigma: Float64s) -> tuple[Float64s, Float64s]:
        """Return the pair (c_skip, c_out) with x0 = c_skip·x + c_out·m."""
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / np.hypot(sigma, self.sigma_data)
        return c_skip, c_out if self.prediction_type == "epsilon" else -c_out

    def input_columns(self, sigma: Float64s) -> dict[str, Any]:
        """Return the columns of the model's inputs and of the noise level."""
        return {
            "t": 0.25 * np.log(sigma),
            "c_in": 1 / np.hypot(sigma, self.sigma_data),
            "alpha": 1.0,
            "sigma": sigma,
            "init_noise_sigma": math.hypot(self.sigma_max, 1),
        }

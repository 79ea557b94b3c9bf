"""What do the samplers of EDM models have in common?

Karras et al. 2022 (https://arxiv.org/abs/2206.00364) wrap a network so that it is shown c_in·x at c_noise = log(σ) / 4
and says x0 = c_skip·x + c_out·m (table 1). The latents are x0 + σ·ε.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling import sigmas
from latentrt.sampling.samplers.options import Kind, PositiveFloat, PositiveInt, Sampler

__all__ = ["EDM"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class EDM(Sampler):
    """A sampler for EDM models. `v_prediction` turns the sign of c_out, as diffusers has it."""

    kind: ClassVar[Kind] = "edm"

    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    sigma_data: PositiveFloat = 0.5
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    num_train_timesteps: PositiveInt = 1000
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rho: PositiveFloat = 7.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def grid(self, ramp: NDArray[np.floating[Any]]) -> Float64s:
        """σ from high to low, float32 values in float64.

        Args:
            ramp: 0 … 1 [N]; the levels of Karras et al. are computed in its precision.
        """
        sigmas.check_ends(self.sigma_min, self.sigma_max)
        if self.sigma_schedule == "exponential":
            rising = sigmas.linspace_float32(math.log(self.sigma_min), math.log(self.sigma_max), len(ramp))
            levels: Float64s = np.exp(rising.astype(np.float64)).astype(np.float32).astype(np.float64)
            return levels[::-1]
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        root = (high + ramp * ramp.dtype.type(low - high)).astype(ramp.dtype)
        spread: Float64s = (root.astype(np.float64) ** self.rho).astype(np.float32).astype(np.float64)
        return spread

    def scales(self, sigma: Float64s) -> tuple[Float64s, Float64s]:
        """c_skip and c_out."""
        c_skip = self.sigma_data**2 / (sigma**2 + self.sigma_data**2)
        c_out = sigma * self.sigma_data / np.hypot(sigma, self.sigma_data)
        return c_skip, c_out if self.prediction_type == "epsilon" else -c_out

    def shown(self, sigma: Float64s) -> dict[str, Any]:
        """The columns of what the model is shown, and what the first noise is multiplied by."""
        return {
            "t": 0.25 * np.log(sigma),
            "c_in": 1 / np.hypot(sigma, self.sigma_data),
            "alpha": 1.0,
            "sigma": sigma,
            "init_noise_sigma": math.hypot(self.sigma_max, 1),
        }

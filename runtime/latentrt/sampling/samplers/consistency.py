"""Multistep sampling of consistency models (Song et al. 2023, https://arxiv.org/abs/2303.01469, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling import sigmas
from latentrt.sampling.samplers.options import Kind, PositiveFloat, PositiveInt, Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["Consistency"]


@dataclass(frozen=True, kw_only=True)
class Consistency(Sampler):
    """A step jumps to the picture, c_skip·x + c_out·m, and puts fresh noise on it: x' = x0 + √(σ'² − σ_min²)·z."""

    title: ClassVar[str] = "Consistency models (Song et al. 2023); fresh noise at every step"
    class_name: ClassVar[str] = "CMStochasticIterativeScheduler"
    kind: ClassVar[Kind] = "consistency"
    takes: ClassVar[frozenset[str]] = frozenset({"timesteps"})

    num_train_timesteps: PositiveInt = 40
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    sigma_data: PositiveFloat = 0.5
    s_noise: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    rho: PositiveFloat = 7.0
    clip_denoised: bool = True

    def table(self, steps: Steps) -> Schedule:
        sigmas.check_ends(self.sigma_min, self.sigma_max)
        if steps.timesteps is None:
            index = sigmas.leading(steps.count, self.num_train_timesteps)
        else:
            index = np.array(steps.timesteps, np.float64)
            if np.any(index != index.round()):
                raise RequestError(f"found timesteps {steps.timesteps}, expected whole ones; round them")
        if index[0] >= self.num_train_timesteps or self.num_train_timesteps < 2:
            raise RequestError(
                f"found timestep {index[0]:g}, but training has only 0 to {self.num_train_timesteps - 1}; "
                "give smaller ones"
            )
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        exact = (high + index[::-1] / (self.num_train_timesteps - 1) * (low - high)) ** self.rho
        told = 250.0 * np.log(exact + 1e-44)
        levels = np.append(exact, self.sigma_min).astype(np.float32).astype(np.float64)[steps.begin :]
        sigma, following = levels[:-1], np.clip(levels[1:], self.sigma_min, self.sigma_max)
        c_skip = self.sigma_data**2 / ((sigma - self.sigma_min) ** 2 + self.sigma_data**2)
        c_out = (sigma - self.sigma_min) * self.sigma_data / np.hypot(sigma, self.sigma_data)
        return Schedule.of(
            t=told[steps.begin :],
            c_in=1 / np.hypot(sigma, self.sigma_data),
            p=c_skip,
            q=c_out,
            limit=1.0 if self.clip_denoised else np.inf,
            a=0.0,
            b=np.ones((len(sigma), 1)),
            s=self.s_noise * np.sqrt(np.maximum(following**2 - self.sigma_min**2, 0)) * (steps.count > 1),
            noise_draws=int(steps.count > 1),
            alpha=1.0,
            sigma=sigma,
            init_noise_sigma=self.sigma_max,
        )

"""Multistep sampling of consistency models (Song et al. 2023, https://arxiv.org/abs/2303.01469, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling.samplers.options import Kind, PositiveFloat, PositiveInt, Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import check_sigma_range, leading_timesteps

__all__ = ["Consistency"]


@dataclass(frozen=True, kw_only=True)
class Consistency(Sampler):
    """A step predicts the image, c_skip·x + c_out·m, and adds fresh noise to it: x' = x0 + √(σ'² − σ_min²)·z."""

    title: ClassVar[str] = "Consistency models (Song et al. 2023); fresh noise at every step"
    class_name: ClassVar[str] = "CMStochasticIterativeScheduler"
    kind: ClassVar[Kind] = "consistency"
    run_options: ClassVar[frozenset[str]] = frozenset({"timesteps"})

    num_train_timesteps: PositiveInt = 40
    sigma_min: PositiveFloat = 0.002
    sigma_max: PositiveFloat = 80.0
    sigma_data: PositiveFloat = 0.5
    s_noise: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    rho: PositiveFloat = 7.0
    clip_denoised: bool = True

    def table(self, steps: Steps) -> Schedule:
        check_sigma_range(self.sigma_min, self.sigma_max)
        if steps.timesteps is None:
            index = leading_timesteps(steps.count, self.num_train_timesteps)
        else:
            index = np.array(steps.timesteps, np.float64)
            if np.any(index != index.round()):
                raise RequestError(f"`timesteps`: got {steps.timesteps}, expected whole numbers")
        if index[0] >= self.num_train_timesteps or self.num_train_timesteps < 2:
            raise RequestError(
                f"`timesteps` has {index[0]:g}, but training has only 0 to {self.num_train_timesteps - 1}; use smaller "
                "ones"
            )
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        exact = (high + index[::-1] / (self.num_train_timesteps - 1) * (low - high)) ** self.rho
        t = 250.0 * np.log(exact + 1e-44)
        sigmas = np.append(exact, self.sigma_min).astype(np.float32).astype(np.float64)[steps.begin :]
        sigma, sigma_next = sigmas[:-1], np.clip(sigmas[1:], self.sigma_min, self.sigma_max)
        c_skip = self.sigma_data**2 / ((sigma - self.sigma_min) ** 2 + self.sigma_data**2)
        c_out = (sigma - self.sigma_min) * self.sigma_data / np.hypot(sigma, self.sigma_data)
        return Schedule.of(
            t=t[steps.begin :],
            c_in=1 / np.hypot(sigma, self.sigma_data),
            p=c_skip,
            q=c_out,
            limit=1.0 if self.clip_denoised else np.inf,
            a=0.0,
            b=np.ones((len(sigma), 1)),
            s=self.s_noise * np.sqrt(np.maximum(sigma_next**2 - self.sigma_min**2, 0)) * (steps.count > 1),
            noise_draws=int(steps.count > 1),
            alpha=1.0,
            sigma=sigma,
            init_noise_sigma=self.sigma_max,
        )

"""Stochastic sampling of VE models (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 2 and table 1).

Two parts do not fit in a row. Noise is added before the model is evaluated; here the row before adds it. And the model
gets (x + 1) / 2: c_in halves x, and the caller adds the ½.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling.samplers.k_diffusion import MAX_CHURN, interleave
from latentrt.sampling.samplers.options import Kind, PositiveFloat, Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import check_sigma_range

__all__ = ["KarrasVe"]

NonNegative = Annotated[float, msgspec.Meta(ge=0)]


@dataclass(frozen=True, kw_only=True)
class KarrasVe(Sampler):
    """Heun's method, each step from latents with fresh noise added up to σ̂.

    As in diffusers, σ is the square of the usual one, and the model gets σ / 2 and its output is multiplied by it.
    """

    title: ClassVar[str] = "Karras VE, Heun with churn (Karras et al. 2022), order 2"
    class_name: ClassVar[str] = "KarrasVeScheduler"
    kind: ClassVar[Kind] = "score"
    unsupported_reason: ClassVar[str] = "the input of its model is (x + 1) / 2; add 1/2 to that of the table"

    sigma_min: PositiveFloat = 0.02
    sigma_max: PositiveFloat = 100.0
    s_noise: NonNegative = 1.007
    s_churn: NonNegative = 80.0
    s_min: NonNegative = 0.05
    s_max: NonNegative = 50.0

    def table(self, steps: Steps) -> Schedule:
        if steps.count < 2:
            raise RequestError("`num_inference_steps`: got 1, expected at least 2: the highest and the lowest sigma")
        check_sigma_range(self.sigma_min, self.sigma_max)
        # In float32, as torch computes it.
        ratio = np.float64(np.float32(self.sigma_min**2 / self.sigma_max**2))
        share = np.arange(steps.count, dtype=np.float32) / np.float32(steps.count - 1)
        grid = np.float32(self.sigma_max**2) * (ratio ** share.astype(np.float64)).astype(np.float32)
        sigmas = np.append(grid, 0.0).astype(np.float64)[steps.begin :]
        sigma, sigma_next = sigmas[:-1], sigmas[1:]
        gamma = np.where((self.s_min <= sigma) & (sigma <= self.s_max), min(self.s_churn / steps.count, MAX_CHURN), 0)
        sigma_hat = sigma * (1 + gamma)
        if gamma[0]:
            raise RequestError(
                f"the first sigma, {sigma[0]:g}, is between `s_min` and `s_max`, where noise would be added before the "
                "first row; lower `s_max`, or reduce `num_inference_steps`"
            )
        noise = self.s_noise * np.sqrt(sigma_hat**2 - sigma**2)
        step, none = sigma_next - sigma_hat, np.zeros(len(sigma))
        t = interleave(sigma_hat, sigma_next[:-1]) / 2
        return Schedule.of(
            t=t,
            c_in=0.5,
            p=0.0,
            q=t,
            # m·σ/2 is −dx/dσ; the second stage adds half the difference of both, and the next step's noise.
            a=1.0,
            b=np.stack([interleave(-step, -step[:-1] / 2), interleave(none, step[:-1] / 2)], axis=1),
            s=interleave(none, noise[1:]),
            noise_draws=interleave(np.append(1.0, none[1:]), 1.0).astype(np.int64),
            alpha=1.0,
            sigma=interleave(sigma_hat, sigma_next[:-1]),
            init_noise_sigma=self.sigma_max,
        )

    def evaluations(self, count: int) -> int:
        return 2 * count - 1

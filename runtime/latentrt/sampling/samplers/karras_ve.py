"""Stochastic sampling of VE models (Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 2 and table 1).

Two things do not fit in a row. Noise is added before the model is asked; here the row before adds it. And pixels are
shown to the model as (x + 1) / 2: c_in halves them, the 1/2 that is added is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling.samplers.k_diffusion import MAX_CHURN, interleaved
from latentrt.sampling.samplers.options import Kind, PositiveFloat, Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import check_ends

__all__ = ["KarrasVe"]

NotNegative = Annotated[float, msgspec.Meta(ge=0)]


@dataclass(frozen=True, kw_only=True)
class KarrasVe(Sampler):
    """Heun's method, each step from a latent that fresh noise has raised. The levels are the squares of those that
    sigma_min and sigma_max say, and the model is told σ / 2 and its output multiplied by it, as in diffusers."""

    title: ClassVar[str] = "Karras VE, Heun with churn (Karras et al. 2022), order 2"
    class_name: ClassVar[str] = "KarrasVeScheduler"
    kind: ClassVar[Kind] = "score"
    exception: ClassVar[str] = "its model is shown (x + 1) / 2; add 1/2 to what the table shows it"

    sigma_min: PositiveFloat = 0.02
    sigma_max: PositiveFloat = 100.0
    s_noise: NotNegative = 1.007
    s_churn: NotNegative = 80.0
    s_min: NotNegative = 0.05
    s_max: NotNegative = 50.0

    def table(self, steps: Steps) -> Schedule:
        if steps.count < 2:
            raise RequestError("found 1 step, expected at least 2: the grid has the highest and the lowest level")
        check_ends(self.sigma_min, self.sigma_max)
        # In float32, as torch computes it.
        ratio = np.float64(np.float32(self.sigma_min**2 / self.sigma_max**2))
        share = np.arange(steps.count, dtype=np.float32) / np.float32(steps.count - 1)
        fallen = np.float32(self.sigma_max**2) * (ratio ** share.astype(np.float64)).astype(np.float32)
        levels = np.append(fallen, 0.0).astype(np.float64)[steps.begin :]
        sigma, following = levels[:-1], levels[1:]
        gamma = np.where((self.s_min <= sigma) & (sigma <= self.s_max), min(self.s_churn / steps.count, MAX_CHURN), 0)
        raised = sigma * (1 + gamma)
        if gamma[0]:
            raise RequestError(
                f"found a first level of {sigma[0]:g} within s_min … s_max, where noise would be added before the "
                "first row; lower s_max, or ask for fewer steps"
            )
        added = self.s_noise * np.sqrt(raised**2 - sigma**2)
        step, none = following - raised, np.zeros(len(sigma))
        told = interleaved(raised, following[:-1]) / 2
        return Schedule.of(
            t=told,
            c_in=0.5,
            p=0.0,
            q=told,
            # m·σ/2 is −dx/dσ; the second stage adds half the difference of both, and the next step's noise.
            a=1.0,
            b=np.stack([interleaved(-step, -step[:-1] / 2), interleaved(none, step[:-1] / 2)], axis=1),
            s=interleaved(none, added[1:]),
            noise_draws=interleaved(np.append(1.0, none[1:]), 1.0).astype(np.int64),
            alpha=1.0,
            sigma=interleaved(raised, following[:-1]),
            init_noise_sigma=self.sigma_max,
        )

    def evaluations(self, count: int) -> int:
        return 2 * count - 1

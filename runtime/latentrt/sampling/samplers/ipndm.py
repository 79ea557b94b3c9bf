"""iPNDM: the last four ε averaged after Adams-Bashforth (`plms_sample` of v-diffusion-pytorch).

The averages are those of equal steps in σ / α, which the steps here are not, so the method is of order 2
(docs/samplers.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling.samplers.multistep import ADAMS_BASHFORTH
from latentrt.sampling.samplers.options import Kind, PositiveInt, Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.sigmas import linspace_float32

__all__ = ["IPNDM"]

MIN_ALPHA = 1e-8


@dataclass(frozen=True, kw_only=True)
class IPNDM(Sampler):
    """For continuous-time models that predict v: σ = sin²(t·π/2), and the history holds ε = σ·x + α·m.

    As in diffusers, `trained_betas` are the σ themselves, one more than there are steps.
    """

    title: ClassVar[str] = "iPNDM, for continuous-time models; averages 4 outputs"
    class_name: ClassVar[str] = "IPNDMScheduler"
    kind: ClassVar[Kind] = "continuous"
    without_effect: ClassVar[Mapping[str, str]] = {"num_train_timesteps": "time is continuous"}

    num_train_timesteps: PositiveInt = 1000
    trained_betas: Annotated[tuple[float, ...], msgspec.Meta(min_length=2)] | None = None

    def table(self, steps: Steps) -> Schedule:
        if self.trained_betas is None:
            # In float32, as torch computes it.
            angle = np.append(linspace_float32(1, 0, steps.count + 1)[:-1], np.float32(0)) * np.float32(np.pi)
            sine = np.sin((angle / np.float32(2)).astype(np.float64)).astype(np.float32)
            beta = sine * sine
        else:
            beta = np.array(self.trained_betas, np.float32)
            if len(beta) != steps.count + 1 or not np.all((beta >= 0) & (beta <= 1)):
                raise RequestError(
                    f"got {len(beta)} `trained_betas`, expected {steps.count + 1} from 0 to 1 for {steps.count} steps"
                )
        scale = np.sqrt((1 - beta * beta).astype(np.float64)).astype(np.float32)
        angle = np.arctan2(beta.astype(np.float64), scale.astype(np.float64)).astype(np.float32)
        t = (angle / np.float32(np.pi) * 2)[:-1]
        sigma, alpha = (column.astype(np.float64)[steps.begin :] for column in (beta, scale))
        ratio = alpha[1:] / np.maximum(alpha[:-1], MIN_ALPHA)
        slope = sigma[1:] - ratio * sigma[:-1]
        b = np.zeros((len(ratio), len(ADAMS_BASHFORTH)))
        for k in range(len(ratio)):
            weights = ADAMS_BASHFORTH[min(k, len(ADAMS_BASHFORTH) - 1)]
            b[k, : len(weights)] = slope[k] * np.array(weights)
        return Schedule.of(
            t=t[steps.begin :],
            p=sigma[:-1],
            q=alpha[:-1],
            a=ratio,
            b=b,
            alpha=alpha[:-1],
            sigma=sigma[:-1],
        )

"""What do the samplers of flow-matching models have in common?

A flow goes straight from noise to the picture, x = (1 − σ)·x0 + σ·ε, and its model says the velocity ε − x0 (Lipman et
al. 2022, https://arxiv.org/abs/2210.02747; Esser et al. 2024, https://arxiv.org/abs/2403.03206).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import sigmas
from latentrt.sampling.samplers.options import Kind, PositiveFloat, PositiveInt, Respaced, Sampler
from latentrt.sampling.samplers.steps import Steps

__all__ = ["Flow", "RespacedFlow", "mu_of"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Flow(Sampler):
    """A sampler over the σ of a flow."""

    kind: ClassVar[Kind] = "flow"

    num_train_timesteps: PositiveInt = 1000
    shift: PositiveFloat = 1.0

    def spread(self, steps: Steps, *, shifts_ends: bool = True) -> Float64s:
        """σ from the highest to the lowest of training, evenly, before they are shifted; float64.

        The ends are those of training as it was shifted, so that they are shifted twice, as in diffusers.
        """
        total = self.num_train_timesteps
        ends = np.array([total, 1], np.float32) / np.float32(total)
        if shifts_ends:
            ends = (np.float32(self.shift) * ends / (1 + np.float32(self.shift - 1) * ends)).astype(np.float32)
        return np.linspace(float(ends[0]) * total, float(ends[1]) * total, steps.count) / total


@dataclass(frozen=True, kw_only=True)
class RespacedFlow(Respaced, Flow):
    """One whose levels can be shifted by the picture's size, stretched, spread anew and turned round.

    With `use_dynamic_shifting` the steps' `mu` takes the place of `shift`; `mu_of` makes it of a picture's size.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"timesteps", "sigmas", "mu"})

    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: PositiveInt = 256
    max_image_seq_len: PositiveInt = 4096
    invert_sigmas: bool = False
    shift_terminal: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def grid(self, steps: Steps) -> tuple[NDArray[np.float32], Float64s]:
        """Timesteps [N], and σ at each of them and after the last [N + 1], float32 values in float64; from `begin` on.

        Raises:
            RequestError: the shift is to depend on the size, and `mu` is not there.
        """
        sigma = self._shifted(steps, self._given(steps))
        if self.shift_terminal:
            sigma = sigmas.stretched(sigma, self.shift_terminal)
        if self.respacing:
            sigma = sigmas.RESPACED[self.respacing](float(sigma[0]), float(sigma[-1]), len(sigma))
        levels = np.minimum(sigma.astype(np.float32), 1)  # rounding may leave more than all of it noise
        if self.invert_sigmas:
            levels = 1 - levels
        t: NDArray[np.float32] = levels * np.float32(self.num_train_timesteps)
        if steps.timesteps is not None and not self.invert_sigmas:
            t = np.array(steps.timesteps, np.float32)
        ended = np.append(levels, np.float32(self.invert_sigmas)).astype(np.float64)
        return t[steps.begin :], ended[steps.begin :]

    def _given(self, steps: Steps) -> NDArray[Any]:
        """Unshifted levels: those that were given in float32, as diffusers goes on with them."""
        if steps.sigmas is not None and not (steps.sigmas[0] <= 1 and steps.sigmas[-1] > 0):
            raise RequestError(
                f"found sigmas from {steps.sigmas[0]:g} to {steps.sigmas[-1]:g}, expected them above 0 and up to "
                "1; the end of the flow is added to them"
            )
        if steps.timesteps is not None and not steps.timesteps[0] <= self.num_train_timesteps:
            raise RequestError(
                f"found timestep {steps.timesteps[0]:g}, but training has only up to {self.num_train_timesteps}; give "
                "smaller ones"
            )
        if steps.sigmas is not None:
            return np.array(steps.sigmas, np.float32)
        if steps.timesteps is not None:
            return np.array(steps.timesteps, np.float32) / np.float32(self.num_train_timesteps)
        return self.spread(steps, shifts_ends=not self.use_dynamic_shifting)

    def _shifted(self, steps: Steps, sigma: NDArray[Any]) -> NDArray[Any]:
        if not self.use_dynamic_shifting:
            if steps.mu is not None:
                raise RequestError(
                    "found mu, which needs use_dynamic_shifting in the scheduler's configuration; leave it out, or set "
                    "that"
                )
            return sigmas.shifted(sigma, self.shift)
        if steps.mu is None:
            raise RequestError(
                "found use_dynamic_shifting, which needs mu, the logarithm of the shift; give mu (for pictures of "
                f"{self.base_image_seq_len} tokens it is {self.base_shift:g}, of {self.max_image_seq_len} "
                f"{self.max_shift:g})"
            )
        return sigmas.dynamically_shifted(sigma, steps.mu, self.time_shift_type)


def mu_of(sampler: RespacedFlow, image_tokens: int) -> float:
    """The `mu` of pictures of so many tokens (of the denoiser: latent pixels / 4 where its patches are 2 × 2).

    A straight line through the configuration's two points, as diffusers' pipelines have it (`calculate_shift`).
    """
    slope = (sampler.max_shift - sampler.base_shift) / (sampler.max_image_seq_len - sampler.base_image_seq_len)
    return sampler.base_shift + slope * (image_tokens - sampler.base_image_seq_len)

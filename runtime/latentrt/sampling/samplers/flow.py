"""The base of samplers of flow-matching models, whose sigmas can be shifted, stretched and spaced anew.

A flow is the straight line from noise to the image, x = (1 − σ)·x0 + σ·ε, and its model predicts the velocity ε − x0
(Lipman et al. 2022, https://arxiv.org/abs/2210.02747; Esser et al. 2024, https://arxiv.org/abs/2403.03206).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling.samplers.options import Kind, PositiveFloat, PositiveInt, Sampler, SigmaSpacing
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.sigmas import (
    SIGMA_SPACINGS,
    shift_sigmas,
    shift_sigmas_dynamically,
    stretch_sigmas_to_terminal,
)

__all__ = ["Flow", "SpacedFlow", "calculate_mu"]

Float64s = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Flow(Sampler):
    """A sampler over σ of a flow."""

    kind: ClassVar[Kind] = "flow"

    num_train_timesteps: PositiveInt = 1000
    shift: PositiveFloat = 1.0

    def space(self, steps: Steps, *, shift_ends: bool = True) -> Float64s:
        """Return evenly spaced σ from the highest to the lowest of training, before they are shifted; float64 [N].

        With `shift_ends` the ends are those of training after its shift, so they are shifted twice, as in diffusers.
        """
        total = self.num_train_timesteps
        ends = np.array([total, 1], np.float32) / np.float32(total)
        if shift_ends:
            ends = (np.float32(self.shift) * ends / (1 + np.float32(self.shift - 1) * ends)).astype(np.float32)
        return np.linspace(float(ends[0]) * total, float(ends[1]) * total, steps.count) / total


@dataclass(frozen=True, kw_only=True)
class SpacedFlow(SigmaSpacing, Flow):
    """A sampler over σ of a flow that can be shifted by the image's size, stretched, spaced anew and inverted.

    With `use_dynamic_shifting` the run's `mu` replaces `shift`; `calculate_mu` computes it from an image's size.
    """

    run_options: ClassVar[frozenset[str]] = frozenset({"timesteps", "sigmas", "mu"})
    without_effect: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
            "of the run's `mu`, which `calculate_mu` computes from an image's size",
        ),
    }

    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: PositiveInt = 256
    max_image_seq_len: PositiveInt = 4096
    invert_sigmas: bool = False
    shift_terminal: Annotated[float, msgspec.Meta(ge=0, lt=1)] | None = None
    time_shift_type: Literal["exponential", "linear"] = "exponential"

    def grid(self, steps: Steps) -> tuple[NDArray[np.float32], Float64s]:
        """Return timesteps [N] and σ [N + 1] from `begin` on, float32 values in float64.

        Raises:
            RequestError: the given grid is beyond the flow's, or `mu` and `use_dynamic_shifting` are not set together.
        """
        spaced = self._shift(steps, self._given_or_spaced(steps))
        if self.shift_terminal:
            spaced = stretch_sigmas_to_terminal(spaced, self.shift_terminal)
        if self.sigma_spacing:
            spaced = SIGMA_SPACINGS[self.sigma_spacing](float(spaced[0]), float(spaced[-1]), len(spaced))
        sigmas = np.minimum(spaced.astype(np.float32), 1)  # rounding may exceed 1
        if self.invert_sigmas:
            sigmas = 1 - sigmas
        t: NDArray[np.float32] = sigmas * np.float32(self.num_train_timesteps)
        if steps.timesteps is not None and not self.invert_sigmas:
            t = np.array(steps.timesteps, np.float32)
        ended = np.append(sigmas, np.float32(self.invert_sigmas)).astype(np.float64)
        return t[steps.begin :], ended[steps.begin :]

    def _given_or_spaced(self, steps: Steps) -> NDArray[Any]:
        """Return σ before the shift; given ones in float32, as in diffusers."""
        if steps.sigmas is not None and not (steps.sigmas[0] <= 1 and steps.sigmas[-1] > 0):
            raise RequestError(
                f"got `sigmas` from {steps.sigmas[0]:g} to {steps.sigmas[-1]:g}, expected them above 0 and at most 1; "
                "the end of the flow is added to them"
            )
        if steps.timesteps is not None and not steps.timesteps[0] <= self.num_train_timesteps:
            raise RequestError(
                f"`timesteps` has {steps.timesteps[0]:g}, but training has only up to {self.num_train_timesteps}; use "
                "smaller ones"
            )
        if steps.sigmas is not None:
            return np.array(steps.sigmas, np.float32)
        if steps.timesteps is not None:
            return np.array(steps.timesteps, np.float32) / np.float32(self.num_train_timesteps)
        return self.space(steps, shift_ends=not self.use_dynamic_shifting)

    def _shift(self, steps: Steps, sigmas: NDArray[Any]) -> NDArray[Any]:
        if not self.use_dynamic_shifting:
            if steps.mu is not None:
                raise RequestError("got `mu` without `use_dynamic_shifting`; leave it out, or set both")
            return shift_sigmas(sigmas, self.shift)
        if steps.mu is None:
            raise RequestError(
                "got `use_dynamic_shifting` without `mu`, the logarithm of the shift; set it (for images of "
                f"{self.base_image_seq_len} tokens it is {self.base_shift:g}, of {self.max_image_seq_len} "
                f"{self.max_shift:g})"
            )
        return shift_sigmas_dynamically(sigmas, steps.mu, self.time_shift_type)


def calculate_mu(sampler: SpacedFlow, image_tokens: int) -> float:
    """Return `mu` for images of `image_tokens` tokens (latent pixels / 4 where the denoiser's patches are 2 × 2).

    It is a straight line through the two points of the configuration, as `calculate_shift` of diffusers' pipelines.
    """
    slope = (sampler.max_shift - sampler.base_shift) / (sampler.max_image_seq_len - sampler.base_image_seq_len)
    return sampler.base_shift + slope * (image_tokens - sampler.base_image_seq_len)

"""VQ-Diffusion: a diffusion of class indices (Gu et al. 2022, https://arxiv.org/abs/2111.14822).

It is discrete, so there is no table. A latent pixel is one of the codebook's vectors or masked; training keeps it with
probability α_t, masks it with γ_t, or replaces it by another with β_t. `step` samples the next state from the posterior
q(x_{t−1} | x_t, x_0), equations 5 and 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling.samplers.options import Kind, Sampler
from latentrt.sampling.samplers.steps import Steps
from latentrt.sampling.schedule import Schedule

__all__ = ["VQDiffusion"]

Float32s = NDArray[np.float32]
Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]

LOG_OF_ZERO = np.float32(np.log(np.float32(1e-30)))


@dataclass(frozen=True, kw_only=True)
class VQDiffusion(Sampler):
    """The transition probabilities of training, and the posterior. `num_vec_classes` includes the masked state."""

    title: ClassVar[str] = "VQ-Diffusion (Gu et al. 2022), over class indices"
    class_name: ClassVar[str] = "VQDiffusionScheduler"
    kind: ClassVar[Kind] = "discrete"
    unsupported_reason: ClassVar[str] = (
        "its states are class indices; use latentrt.sampling.samplers.vq_diffusion.VQDiffusion.step"
    )

    num_vec_classes: Annotated[int, msgspec.Meta(ge=2)]
    num_train_timesteps: Annotated[int, msgspec.Meta(ge=2)] = 100
    alpha_cum_start: Share = 0.99999
    alpha_cum_end: Share = 0.000009
    gamma_cum_start: Share = 0.000009
    gamma_cum_end: Share = 0.99999

    def table(self, steps: Steps) -> Schedule:
        raise RequestError(
            "got `sampler` vq_diffusion, which has no table, as its states are class indices; use "
            "latentrt.sampling.samplers.vq_diffusion.VQDiffusion.step"
        )

    def timesteps(self, count: int) -> NDArray[np.int64]:
        """Return the timesteps, descending from count − 1."""
        return np.arange(count)[::-1]

    def step(self, log_p_x0: Float32s, x_t: NDArray[np.int64], t: int, uniform: Float32s) -> NDArray[np.int64]:
        """Sample the next state.

        Args:
            log_p_x0: the model's log probabilities of each class except the masked one, float32 [batch, classes − 1,
                pixels].
            x_t: the state, [batch, pixels].
            t: the timestep.
            uniform: random numbers in 0 … 1, float32 [batch, classes, pixels], or at t = 0, where no pixel stays
                masked, [batch, classes − 1, pixels].

        Returns:
            [batch, pixels].
        """
        log_p = log_p_x0 if t == 0 else self.posterior(log_p_x0, x_t, t)
        tiny = np.float32(1e-30)
        gumbel = -np.log(-np.log(uniform + tiny) + tiny)
        sampled: NDArray[np.int64] = np.argmax(gumbel + log_p, axis=1)
        return sampled

    def posterior(self, log_p_x0: Float32s, x_t: NDArray[np.int64], t: int) -> Float32s:
        """Return log q(x_{t−1} | x_t), summed over x_0, float32 [batch, classes, pixels]."""
        one_hot = np.full((len(x_t), self.num_vec_classes, x_t.shape[1]), LOG_OF_ZERO, np.float32)
        np.put_along_axis(one_hot, x_t[:, np.newaxis], 0, axis=1)
        q = log_p_x0 - self._log_q(one_hot, x_t, t, cumulative=True)
        total = _log_sum(q)
        keep, other, mask = self._log_probabilities(cumulative=True)[:, t - 1]
        mixed = np.logaddexp(q - total + keep, other)
        mixed = np.concatenate([mixed, np.full_like(total, mask)], axis=1)
        posterior: Float32s = mixed + self._log_q(one_hot, x_t, t, cumulative=False) + total
        return posterior

    def _log_q(self, one_hot: Float32s, x_t: NDArray[np.int64], t: int, *, cumulative: bool) -> Float32s:
        """Return log q(x_t | x_0) (`cumulative`) or log q(x_t | x_{t−1}) of the given x_t."""
        keep, other, mask = self._log_probabilities(cumulative=cumulative)[:, t]
        log_q = np.logaddexp(one_hot[:, :-1] + keep, other)
        log_q = np.where((x_t == self.num_vec_classes - 1)[:, np.newaxis], mask, log_q)
        # A masked pixel stays masked.
        likelihood: Float32s = log_q if cumulative else np.concatenate([log_q, one_hot[:, -1:]], axis=1)
        return likelihood

    def _log_probabilities(self, *, cumulative: bool) -> Float32s:
        """Return the logarithms of α, β and γ at each timestep, float32 [3, timesteps (+ 1)]."""
        ramp = np.arange(self.num_train_timesteps) / (self.num_train_timesteps - 1)
        keep = ramp * (self.alpha_cum_end - self.alpha_cum_start) + self.alpha_cum_start
        mask = ramp * (self.gamma_cum_end - self.gamma_cum_start) + self.gamma_cum_start
        if cumulative:
            keep, mask = np.append(keep, 1), np.append(mask, 0)
        else:
            keep = keep / np.append(1, keep[:-1])
            mask = 1 - (1 - mask) / np.append(1, 1 - mask[:-1])
        other = (1 - keep - mask) / (self.num_vec_classes - 1)
        with np.errstate(divide="ignore"):
            logs: Float32s = np.log(np.stack([keep, other, mask])).astype(np.float32)
        return logs


def _log_sum(q: Float32s) -> Float32s:
    """Return log Σ e^q over the classes, [batch, 1, pixels]."""
    most = q.max(axis=1, keepdims=True)
    total: Float32s = most + np.log(np.sum(np.exp(q - most), axis=1, keepdims=True))
    return total

"""VQ-Diffusion: a diffusion of class indices (Gu et al. 2022, https://arxiv.org/abs/2111.14822).

It is discrete, so there is no table. A latent pixel is one of the codebook's vectors or masked; training keeps it with
probability α_t, masks it with γ_t, or takes another with β_t. `step` draws the next state from the posterior q(x_{t−1}
| x_t, x_0), equations 5 and 8.
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
    """The probabilities of training and what follows from them. `num_vec_classes` counts the masked state."""

    title: ClassVar[str] = "VQ-Diffusion (Gu et al. 2022); classes in place of numbers"
    class_name: ClassVar[str] = "VQDiffusionScheduler"
    kind: ClassVar[Kind] = "discrete"
    exception: ClassVar[str] = "its states are classes; `VQDiffusion.step` does a step"

    num_vec_classes: Annotated[int, msgspec.Meta(ge=2)]
    num_train_timesteps: Annotated[int, msgspec.Meta(ge=2)] = 100
    alpha_cum_start: Share = 0.99999
    alpha_cum_end: Share = 0.000009
    gamma_cum_start: Share = 0.000009
    gamma_cum_end: Share = 0.99999

    def table(self, steps: Steps) -> Schedule:
        raise RequestError(
            "found sampler vq_diffusion, whose states are classes and which therefore has no table; use "
            "`latentrt.sampling.samplers.vq_diffusion.VQDiffusion.step`"
        )

    def timesteps(self, count: int) -> NDArray[np.int64]:
        """Descending from count − 1."""
        return np.arange(count)[::-1]

    def step(self, log_p_x0: Float32s, x_t: NDArray[np.int64], t: int, uniform: Float32s) -> NDArray[np.int64]:
        """The next state.

        Args:
            log_p_x0: the model's log probabilities of each class but the masked one, float32 [batch, classes − 1,
                pixels].
            x_t: the state, [batch, pixels].
            t: the timestep.
            uniform: a draw from 0 … 1 for each class and pixel, float32 [batch, classes, pixels], or at t = 0
                [batch, classes − 1, pixels], where nothing is masked any more.

        Returns:
            [batch, pixels].
        """
        log_p = log_p_x0 if t == 0 else self.posterior(log_p_x0, x_t, t)
        tiny = np.float32(1e-30)
        gumbel = -np.log(-np.log(uniform + tiny) + tiny)
        drawn: NDArray[np.int64] = np.argmax(gumbel + log_p, axis=1)
        return drawn

    def posterior(self, log_p_x0: Float32s, x_t: NDArray[np.int64], t: int) -> Float32s:
        """log q(x_{t−1} | x_t) summed over x_0, float32 [batch, classes, pixels]."""
        one_hot = np.full((len(x_t), self.num_vec_classes, x_t.shape[1]), LOG_OF_ZERO, np.float32)
        np.put_along_axis(one_hot, x_t[:, np.newaxis], 0, axis=1)
        q = log_p_x0 - self._to_known(one_hot, x_t, t, cumulative=True)
        total = _log_sum(q)
        kept, other, masked = self._log_shares(cumulative=True)[:, t - 1]
        spread = np.logaddexp(q - total + kept, other)
        spread = np.concatenate([spread, np.full_like(total, masked)], axis=1)
        posterior: Float32s = spread + self._to_known(one_hot, x_t, t, cumulative=False) + total
        return posterior

    def _to_known(self, one_hot: Float32s, x_t: NDArray[np.int64], t: int, *, cumulative: bool) -> Float32s:
        """log q(x_t | x_0) or log q(x_t | x_{t−1}), of the state that is known."""
        kept, other, masked = self._log_shares(cumulative=cumulative)[:, t]
        log_q = np.logaddexp(one_hot[:, :-1] + kept, other)
        log_q = np.where((x_t == self.num_vec_classes - 1)[:, np.newaxis], masked, log_q)
        # What is masked stays so.
        known: Float32s = log_q if cumulative else np.concatenate([log_q, one_hot[:, -1:]], axis=1)
        return known

    def _log_shares(self, *, cumulative: bool) -> Float32s:
        """The logarithms of α, β and γ at each timestep, float32 [3, timesteps (+ 1)]."""
        ramp = np.arange(self.num_train_timesteps) / (self.num_train_timesteps - 1)
        kept = ramp * (self.alpha_cum_end - self.alpha_cum_start) + self.alpha_cum_start
        masked = ramp * (self.gamma_cum_end - self.gamma_cum_start) + self.gamma_cum_start
        if cumulative:
            kept, masked = np.append(kept, 1), np.append(masked, 0)
        else:
            kept = kept / np.append(1, kept[:-1])
            masked = 1 - (1 - masked) / np.append(1, 1 - masked[:-1])
        other = (1 - kept - masked) / (self.num_vec_classes - 1)
        with np.errstate(divide="ignore"):
            shares: Float32s = np.log(np.stack([kept, other, masked])).astype(np.float32)
        return shares


def _log_sum(q: Float32s) -> Float32s:
    """log Σ e^q over the classes, [batch, 1, pixels]."""
    most = q.max(axis=1, keepdims=True)
    total: Float32s = most + np.log(np.sum(np.exp(q - most), axis=1, keepdims=True))
    return total

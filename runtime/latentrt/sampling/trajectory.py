"""Where do latents live while they are denoised: on the host, or on a device?

On the host the table is run in numpy (`latentrt.sampling.schedule.denoise`) and the denoiser is asked once for each
row. A backend whose denoiser can keep latents on its device offers `trajectory`, and does rows there, as far as it
knows how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Session
from latentrt.errors import RequestError
from latentrt.request import Order
from latentrt.sampling.denoiser import Asking, check_finite
from latentrt.sampling.schedule import Latents, Schedule, denoise
from latentrt.text.clip import Conditioning

__all__ = ["Denoising", "KeepsLatents", "Trajectory", "begin", "check_changed"]


@dataclass(frozen=True)
class Denoising:
    """What a loop is to do.

    Attributes:
        schedule: its table.
        latents: x_0, float32 [batch, channels, height, width].
        embeddings: what the denoiser is told of the prompts, read-only: float32 [batch, tokens, width], or
            [2 · batch, …] with the negative prompts first.
        guidance_scale: None without guidance.
        noise: the next draw of standard normal noise, in the latents' shape.
    """

    schedule: Schedule
    latents: Latents
    embeddings: NDArray[np.float32]
    guidance_scale: float | None
    noise: Callable[[], Latents]


class Trajectory(Protocol):
    """A denoising loop that is done row by row."""

    def step(self, changed: Latents | None) -> Callable[[], Latents]:
        """Do a row, with other latents if there are; what fetches those after it."""

    def close(self) -> None:
        """No more rows are wanted."""


@runtime_checkable
class KeepsLatents(Protocol):
    """A denoiser that can keep latents on its device."""

    def trajectory(self, job: Denoising) -> Trajectory | None:
        """A loop on the device; None where this one has to be done on the host."""


def begin(
    denoiser: Session,
    schedule: Schedule,
    latents: Latents,
    conditionings: Sequence[Conditioning],
    order: Order,
    noise: Callable[[], Latents],
) -> Trajectory:
    """The loop of an order, on the denoiser's device where that can be."""
    # Prompts of different lengths are asked apart; rescaled guidance and dynamic thresholding look at whole pictures;
    # what is left out differs from row to row.
    on_host = order.guidance_rescale or np.any(schedule.quantile) or order.approximation.changes_rows
    if isinstance(denoiser, KeepsLatents) and len(conditionings) == 1 and not on_host:
        scale = order.guidance_scale if order.guided else None
        found = denoiser.trajectory(Denoising(schedule, latents, conditionings[0].embeddings, scale, noise))
        if found is not None:
            return found
    return _OnHost(denoiser, schedule, latents, conditionings, order, noise)


class _OnHost:
    def __init__(
        self,
        denoiser: Session,
        schedule: Schedule,
        latents: Latents,
        conditionings: Sequence[Conditioning],
        order: Order,
        noise: Callable[[], Latents],
    ) -> None:
        self._rows = iter(schedule.t)
        asking = Asking(denoiser, schedule.t, conditionings, order)
        asking.expect(latents.shape)
        self._loop = denoise(schedule, latents, model=asking, noise=noise)

    def step(self, changed: Latents | None) -> Callable[[], Latents]:
        latents = self._loop.send(changed)
        check_finite(latents, next(self._rows))
        return lambda: latents

    def close(self) -> None:
        self._loop.close()


def check_changed(latents: object, shape: tuple[int, ...]) -> Latents:
    """The latents that a consumer of the steps wants to go on with.

    Raises:
        RequestError: they are not finite numbers of that shape.
    """
    if not isinstance(latents, np.ndarray) or latents.shape != shape or not np.isfinite(latents).all():
        found = getattr(latents, "shape", type(latents).__name__)
        raise RequestError(f"latents to go on with: found {found}, expected a numpy array of finite numbers, {shape}")
    return latents.astype(np.float32, copy=False)

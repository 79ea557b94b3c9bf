"""What does whoever watches the denoising loop get to see of a step?"""

from __future__ import annotations

from collections.abc import Callable

from latentrt.errors import LatentRTError
from latentrt.sampling.schedule import Latents

__all__ = ["Step"]


class Step:
    """One model evaluation that has been made.

    Args:
        index, total: which of how many; a sampler may need more evaluations than it was asked for steps.
        timestep: what the denoiser was told.
        fetch: gives the latents, from wherever they are.

    Attributes:
        looked_at: whether the latents were read or replaced.
    """

    def __init__(self, index: int, total: int, timestep: float, fetch: Callable[[], Latents]) -> None:
        self.index, self.total, self.timestep = index, total, timestep
        self.looked_at, self._fetch = False, fetch

    @property
    def latents(self) -> Latents:
        """float32 [pictures, channels, height / factor, width / factor], after the step; fetched from the device they
        are on when they are first read, before the generator is resumed. What stands here then is what it goes on with.
        """
        if not self.looked_at:
            self.latents = self._fetch()
        return self._latents

    @latents.setter
    def latents(self, latents: Latents) -> None:
        self._latents, self.looked_at = latents, True

    def settle(self) -> None:
        """Keep the latents, or the error that they are, as the device goes on to something else."""
        try:
            _ = self.latents
        except LatentRTError as error:
            self._fetch = _raising(error)


def _raising(error: LatentRTError) -> Callable[[], Latents]:
    def fetch() -> Latents:
        raise error

    return fetch

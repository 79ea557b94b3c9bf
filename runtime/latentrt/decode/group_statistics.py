"""Mean and variance of groups of channels, accumulated over bands of rows.

Group normalisation (Wu and He 2018, arXiv 1803.08494) needs both before it can change a value. Each band's are
computed in two passes, and bands are combined in float64 (Chan, Golub and LeVeque 1983, "Algorithms for computing the
sample variance", equation 2.1): no precision is lost where the mean is far from zero, as it would be by summing
squares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["GroupStatistics"]


class GroupStatistics:
    """Running mean and variance of each group of channels.

    Args:
        groups: number of groups; it divides the number of channels.
    """

    def __init__(self, groups: int) -> None:
        self._groups, self._count = groups, 0
        self._mean: NDArray[np.float64] = np.zeros(())
        self._squares: NDArray[np.float64] = np.zeros(())

    def add(self, band: NDArray[np.float32]) -> None:
        """Accumulate one band.

        Args:
            band: float32 [B, C, rows, W].
        """
        groups = band.reshape(len(band), self._groups, -1)
        mean, squares = np.empty((2, *groups.shape[:2]))
        for index in np.ndindex(*groups.shape[:2]):  # one group at a time, which fits the processor's cache
            mean[index] = groups[index].mean()  # pairwise sums: as accurate as float64 for this many values
            deviation = groups[index] - groups.dtype.type(mean[index])
            squares[index] = np.square(deviation, out=deviation).sum()
        count = groups.shape[2]
        total, delta = self._count + count, mean - self._mean
        self._squares = self._squares + squares + delta**2 * (self._count * count / total)
        self._mean = self._mean + delta * (count / total)
        self._count = total

    def feeds(self) -> dict[str, NDArray[np.float32]]:
        """Return a slice's inputs `mean` and `variance`, float32 [B, groups]."""
        return {"mean": self._mean.astype(np.float32), "variance": (self._squares / self._count).astype(np.float32)}

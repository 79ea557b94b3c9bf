"""Mean and variance of groups of channels, of features that are seen a band at a time.

Group normalisation (Wu and He 2018, arXiv 1803.08494) needs both before it can change a value. Of each band they are
computed in two passes, and bands are joined in float64 (Chan, Golub and LeVeque 1983, "Algorithms for computing the
sample variance", equation 2.1): nothing is lost where the mean is far from zero, as it would be by summing squares.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["GroupStatistics"]


class GroupStatistics:
    """What has been seen so far.

    Args:
        groups: into so many the channels are divided.
    """

    def __init__(self, groups: int) -> None:
        self._groups, self._count = groups, 0
        self._mean: NDArray[np.float64] = np.zeros(())
        self._squares: NDArray[np.float64] = np.zeros(())

    def add(self, band: NDArray[np.float32]) -> None:
        """See a band.

        Args:
            band: (B, C, rows, W).
        """
        groups = band.reshape(len(band), self._groups, -1)
        mean, squares = np.empty((2, *groups.shape[:2]))
        for place in np.ndindex(*groups.shape[:2]):  # one group at a time, for the sake of the processor's cache
            mean[place] = groups[place].mean()  # pairwise sums: as good as float64 for as few values
            off = groups[place] - groups.dtype.type(mean[place])
            squares[place] = np.square(off, out=off).sum()
        count = groups.shape[2]
        total, apart = self._count + count, mean - self._mean
        self._squares = self._squares + squares + apart**2 * (self._count * count / total)
        self._mean = self._mean + apart * (count / total)
        self._count = total

    def feeds(self) -> dict[str, NDArray[np.float32]]:
        """`mean` and `variance`, (B, groups), as a stage takes them."""
        return {"mean": self._mean.astype(np.float32), "variance": (self._squares / self._count).astype(np.float32)}

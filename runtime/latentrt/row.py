"""What does a row of a table do with a latent?

The arithmetic of `latentrt.schedule`'s formulas, in float32. A coefficient is a number, or an array [batch, 1, 1, 1]
where each sample has its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COEFFICIENTS", "Coefficient", "Latents", "Row", "advanced", "remembered", "scaled"]

Latents = NDArray[np.float32]  # [batch, channels, height, width]
Coefficient = NDArray[np.float32] | np.float32
Row = Mapping[str, Any]  # a coefficient by its name; b is as many as the memory is deep

COEFFICIENTS = ("c_in", "p", "q", "limit", "quantile", "u", "w", "a", "e", "d", "b", "s")


def scaled(c_in: Coefficient, x: Latents) -> Latents:
    """What the denoiser is shown."""
    return _combined(x, [(c_in, x)])


def remembered(row: Row, x: Latents, m: Latents) -> Latents:
    """h = u·x + w·y."""
    y = _bounded(_combined(x, [(row["p"], x), (row["q"], m)]), row["limit"], row["quantile"])
    return _combined(x, [(row["u"], x), (row["w"], y)])


def advanced(
    row: Row, x: Latents, m: Latents, previous: Latents | None, history: Iterable[Latents], z: Latents | None
) -> Latents:
    """The next latent, of this one, the model's output, the latent before, what is remembered (newest first) and noise.

    Raises:
        ValueError: the row uses one of them that is not there.
    """
    past = zip_longest(row["b"], history)
    return _combined(x, [(row["a"], x), (row["e"], previous), (row["d"], m), *past, (row["s"], z)])


def _bounded(y: Latents, limit: Coefficient, quantile: Coefficient) -> Latents:
    """y within its limit; with a quantile, also divided by the limit that this makes of it."""
    if not np.any(np.isfinite(limit)):
        return y
    clipped = np.clip(y, -limit, limit)
    if not np.any(quantile):
        return clipped
    bound = np.clip(_quantiles(np.abs(y), quantile), 1, None)
    bound = np.minimum(bound, limit).astype(np.float32)
    thresholded: Latents = np.where(quantile > 0, np.clip(y, -bound, bound) / bound, clipped)
    return thresholded


def _quantiles(size: Latents, quantile: Coefficient) -> NDArray[np.float32]:
    """A quantile of each sample, [batch, 1, 1, 1], between two of its values as `torch.quantile` interpolates."""
    values = np.sort(size.reshape(len(size), -1), axis=1)
    last = values.shape[1] - 1
    rank = (np.asarray(quantile, np.float32) * np.float32(last)).reshape(-1, 1)
    rank = np.broadcast_to(rank, (len(size), 1))
    below = np.floor(rank).astype(np.int64)
    low, high = (np.take_along_axis(values, np.minimum(index, last), axis=1) for index in (below, below + 1))
    between: NDArray[np.float32] = low + (rank - below.astype(np.float32)) * (high - low)
    return between.reshape(-1, 1, 1, 1)


def _combined(like: Latents, terms: Iterable[tuple[Coefficient, Latents | None]]) -> Latents:
    """Σ coefficient · array, a new array.

    A zero coefficient skips its array: that costs no pass over it, and it may be absent or not finite.
    """
    total = np.zeros_like(like)
    for coefficient, array in terms:
        if not np.any(coefficient):
            continue
        if array is None:
            raise ValueError("a row needs noise, an earlier latent or an earlier output, and there is none")
        if np.ndim(coefficient):
            # Sample by sample, as each would be alone: where its coefficient is zero, an array may be anything.
            total += np.multiply(coefficient, array, out=np.zeros_like(like), where=coefficient != 0)
        else:
            total += coefficient * array
    return total

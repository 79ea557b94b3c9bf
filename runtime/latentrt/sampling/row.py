"""What does a row of a table do with a latent?

The arithmetic of `latentrt.sampling.schedule`'s formulas, in the precision of what it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["COEFFICIENTS", "Coefficient", "Latents", "Row", "advanced", "remembered", "scaled"]

Latents = NDArray[np.float32]  # [batch, channels, height, width], or one of them
Coefficient = np.float32
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
    if not np.isfinite(limit):
        return y
    if not quantile:
        return np.clip(y, -limit, limit)
    bound = np.minimum(np.maximum(_quantiles(np.abs(y), quantile), 1), limit).astype(y.dtype)
    thresholded: Latents = np.clip(y, -bound, bound) / bound
    return thresholded


def _quantiles(size: Latents, quantile: Coefficient) -> Latents:
    """A quantile of each sample, [batch, 1, 1, 1] or [1, 1, 1], between two values as `torch.quantile` interpolates."""
    samples = size.reshape(*size.shape[:-3], -1)
    values = np.sort(samples, axis=-1)
    rank = np.float32(quantile) * np.float32(values.shape[-1] - 1)
    below = int(rank)
    low, high = (values[..., min(index, values.shape[-1] - 1)] for index in (below, below + 1))
    between: Latents = low + values.dtype.type(rank - np.float32(below)) * (high - low)
    return between[..., np.newaxis, np.newaxis, np.newaxis]


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
        total += coefficient * array
    return total

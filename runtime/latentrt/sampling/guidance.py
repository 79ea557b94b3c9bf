"""Classifier-free guidance: one model, asked twice in one batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["guide"]

Floats = NDArray[np.float32]


def guide(outputs: Floats, scale: float, rescale: float) -> Floats:
    """The guided model output.

    Ho and Salimans 2022, equation 6, in diffusers' form: uncond + w · (cond − uncond). With `rescale` φ > 0 its
    standard deviation goes back towards that of the conditional output (Lin et al. 2023, equations 15 and 16).

    Args:
        outputs: float32 [2 · batch, channels, height, width]; the negative prompt's half first.
        scale: w.
        rescale: φ, 0 to 1.

    Returns:
        float32 [batch, channels, height, width].
    """
    negative, positive = np.split(outputs, 2)
    guided: Floats = negative + np.float32(scale) * (positive - negative)
    if rescale == 0:
        return guided
    matched = guided * (_deviation(positive) / _deviation(guided))
    phi = np.float32(rescale)
    rescaled: Floats = phi * matched + (1 - phi) * guided
    return rescaled


def _deviation(outputs: Floats) -> Floats:
    """Standard deviation of each sample, with torch's n − 1: [batch, 1, 1, 1]."""
    return np.asarray(outputs.std(axis=(1, 2, 3), ddof=1, keepdims=True), np.float32)

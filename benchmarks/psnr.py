"""The peak signal-to-noise ratio of images, as all benchmarks state it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["psnr_db"]


def psnr_db(pixels: NDArray[Any], reference: NDArray[Any], *, digits: int = 2) -> float | None:
    """Return the PSNR of 8-bit pixels in decibels, over all values; None if they are equal."""
    from skimage.metrics import peak_signal_noise_ratio

    if np.array_equal(pixels, reference):
        return None
    return round(float(peak_signal_noise_ratio(reference, pixels, data_range=255)), digits)

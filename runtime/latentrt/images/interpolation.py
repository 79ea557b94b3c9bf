"""Interpolation of float32 arrays as `torch.nn.functional.interpolate` computes it on a CPU.

Neither mode is antialiased, and pixels are areas, not points (`align_corners=False`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["interpolate_bicubic", "interpolate_nearest"]

Floats = NDArray[np.float32]

Doubles = NDArray[np.float64]

# The A of Keys 1981, "Cubic convolution interpolation for digital image processing", as PyTorch chooses it.
_A = -0.75


def interpolate_nearest(array: Floats, height: int, width: int) -> Floats:
    """Resize float32 [..., H, W] to [..., height, width] as `mode="nearest"` does; every index is rounded down.

    Source: `nearest_neighbor_compute_source_index` in PyTorch's `aten/src/ATen/native/UpSample.h`.
    """
    rows = _nearest_indices(array.shape[-2], height)
    columns = _nearest_indices(array.shape[-1], width)
    return array[..., rows[:, None], columns]


def interpolate_bicubic(array: Floats, height: int, width: int) -> Floats:
    """Resize float32 [..., H, W] to [..., height, width] as `mode="bicubic", align_corners=False` does.

    Sums in float64; PyTorch's own rounding is the only difference, about 3e-6 for values of order 1.

    Source: `get_cubic_upsample_coefficients` in PyTorch's `aten/src/ATen/native/UpSample.h`.
    """
    columns, weights = _bicubic_taps(array.shape[-1], width)  # both (4, width)
    wide = np.einsum("...tw,tw->...w", array[..., columns], weights)  # (..., H, width)
    rows, weights = _bicubic_taps(array.shape[-2], height)  # both (4, height)
    return np.asarray(np.einsum("...thw,th->...hw", wide[..., rows, :], weights), np.float32)


def _nearest_indices(size: int, new_size: int) -> NDArray[np.int64]:
    # PyTorch computes the scale and the product in float32, which decides about some indices.
    scale = np.float32(size) / np.float32(new_size)
    indices: NDArray[np.int64] = np.floor(np.arange(new_size, dtype=np.float32) * scale).astype(np.int64)
    return np.minimum(indices, size - 1, dtype=np.int64)


def _bicubic_taps(size: int, new_size: int) -> tuple[NDArray[np.int64], Doubles]:
    """Return the source indices and the weights of the four neighbours of each output, both [4, new_size]."""
    # PyTorch's positions have one float32 rounding (a fused multiply-add); their fraction inherits it.
    scale = np.float64(np.float32(size) / np.float32(new_size))
    position = (scale * (np.arange(new_size) + 0.5) - 0.5).astype(np.float32)
    base = np.floor(position)
    t = (position - base).astype(np.float64)
    indices = base.astype(np.int64) + np.arange(-1, 3)[:, None]
    weights = np.stack([_outer_weight(t + 1), _inner_weight(t), _inner_weight(1 - t), _outer_weight(2 - t)])
    return np.clip(indices, 0, size - 1), weights


def _inner_weight(x: Doubles) -> Doubles:
    """Return the weight of a neighbour at distance x ≤ 1."""
    return ((_A + 2) * x - (_A + 3)) * x * x + 1


def _outer_weight(x: Doubles) -> Doubles:
    """Return the weight of a neighbour at distance 1 ≤ x ≤ 2."""
    return ((_A * x - 5 * _A) * x + 8 * _A) * x - 4 * _A

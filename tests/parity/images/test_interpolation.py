from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from latentrt.images.interpolation import interpolate_bicubic, interpolate_nearest

SIZES = [tuple(map(int, sizes)) for sizes in np.random.default_rng(0).integers(1, 70, (100, 4))]
# The mask of an image of 512 × 768, a depth map of 384 × 384, and sizes where float32 indices differ from exact ones.
SIZES += [(512, 768, 64, 96), (384, 384, 64, 96), (384, 384, 65, 47), (100, 1000, 49, 999)]


def array(height: int, width: int) -> NDArray[np.float32]:
    return np.random.default_rng(height * width).standard_normal((1, 2, height, width)).astype(np.float32)


@pytest.mark.parametrize("sizes", SIZES)
def test_nearest_equals_torch(sizes: tuple[int, int, int, int]) -> None:
    values, size = array(*sizes[:2]), sizes[2:]
    assert np.array_equal(interpolate_nearest(values, *size), interpolate(torch.from_numpy(values), size).numpy())


@pytest.mark.parametrize("sizes", SIZES)
def test_bicubic_equals_torch(sizes: tuple[int, int, int, int]) -> None:
    values, size = array(*sizes[:2]), sizes[2:]
    expected = interpolate(torch.from_numpy(values), size, mode="bicubic", align_corners=False).numpy()
    # Values reach ±4. torch rounds weights and sums to float32 (measured: 3e-6 with fused multiply-adds); without them
    # its positions are rounded once more, which moves the weights by up to 1e-5.
    assert np.abs(interpolate_bicubic(values, *size) - expected).max() <= 4e-5


def test_the_upscaler_doubles_latents_as_torch() -> None:
    values = array(7, 9)
    expected = interpolate(torch.from_numpy(values), scale_factor=2, mode="nearest").numpy()
    assert np.array_equal(interpolate_nearest(values, 14, 18), expected)

from __future__ import annotations

import numpy as np
import pytest

from latentrt.images.interpolation import interpolate_bicubic, interpolate_nearest


def test_nearest_takes_the_first_pixel_of_each_cell() -> None:
    array = np.arange(64, dtype=np.float32).reshape(1, 1, 8, 8)
    assert np.array_equal(interpolate_nearest(array, 2, 4), array[:, :, ::4, ::2])
    assert np.array_equal(interpolate_nearest(array, 16, 8), array.repeat(2, axis=2))


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8), (13, 6)])
def test_bicubic_keeps_constants_and_the_same_size(size: tuple[int, int]) -> None:
    constant = np.full((2, 8, 8), 0.3, np.float32)
    assert np.allclose(interpolate_bicubic(constant, *size), 0.3, rtol=1e-6)
    array = np.random.default_rng(0).standard_normal((2, *size)).astype(np.float32)
    assert np.array_equal(interpolate_bicubic(array, *size), array)


def test_bicubic_keeps_a_ramp_away_from_the_edges() -> None:
    ramp = np.arange(16, dtype=np.float32)[None].repeat(16, axis=0)
    enlarged = interpolate_bicubic(ramp, 16, 32)
    assert enlarged.dtype == np.float32
    # With A = −0.5 the kernel reproduces a straight line; PyTorch's A = −0.75 is off by 3/64 at quarters of a pixel.
    error = np.abs(enlarged[8, 4:-4] - (np.arange(4, 28) / 2 - 0.25))
    assert error == pytest.approx(np.full(24, 3 / 64))

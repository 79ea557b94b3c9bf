from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import noise

Float32s = NDArray[np.float32]


def test_the_noise_of_a_seed_is_that_of_torch() -> None:
    """Recorded from torch; tests/parity/sampling/test_noise.py compares many seeds and sizes."""
    large = noise.Generator(0).normal((4, 64, 64))
    digest = "24efac55b39e95b2d74d8fb5b3a8e8a8e808bd04129f260c4cdbb225bb952a4d"
    assert hashlib.sha256(large.astype("<f4").tobytes()).hexdigest() == digest
    # Fewer than 16 values are made one by one, in float64.
    np.testing.assert_allclose(noise.Generator(0).normal((3,)), [1.5409961, -0.2934289, -2.1787894], rtol=1e-6)


def test_an_image_of_a_batch_has_the_noise_of_its_seed() -> None:
    batch = noise.draw([noise.Generator(seed) for seed in (3, 4, 5)], (4, 9, 7))
    assert batch.shape == (3, 4, 9, 7)
    for image, seed in zip(batch, (3, 4, 5), strict=True):
        np.testing.assert_array_equal(image, noise.Generator(seed).normal((4, 9, 7)))


def test_only_the_low_32_bits_of_a_seed_count() -> None:
    np.testing.assert_array_equal(noise.Generator(2**32 + 9).normal((16,)), noise.Generator(9).normal((16,)))


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, None, "7"], ids=repr)
def test_other_seeds_are_rejected(seed: object) -> None:
    with pytest.raises(RequestError, match=r"`seed`: got .* 2\*\*64"):
        noise.Generator(seed)  # type: ignore[arg-type]


def test_numbers_are_standard_normal() -> None:
    values = noise.Generator(0).normal((100_000,))
    # Five standard errors of the mean and of the variance.
    assert abs(values.mean()) < 5 / math.sqrt(values.size)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / values.size)


# There are 2^24 uniforms; every 7th, which is not a power of two, covers every binade.
UNIFORM = np.arange(0, 2**24, 7, dtype=np.uint32).astype(np.float32) * np.float32(2**-24)


def test_log_is_right_within_a_unit_in_the_last_place() -> None:
    x = 1 - UNIFORM
    found, expected = noise.cephes_log(x), np.log(x.astype(np.float64))
    assert found.dtype == np.float32
    assert np.all(np.abs(found - expected) <= np.spacing(np.abs(expected).astype(np.float32)))


def test_sine_and_cosine_are_right_within_float32() -> None:
    angle = np.float32(2 * math.pi) * UNIFORM
    for found, expected in zip(noise.cephes_sincos(angle), (np.sin, np.cos), strict=True):
        assert found.dtype == np.float32
        # Half a unit of numbers near 1, twice: a sine near a multiple of π is only as exact as the reduced angle.
        np.testing.assert_allclose(found, expected(angle.astype(np.float64)), rtol=0, atol=1.2e-7)


@pytest.mark.slow
def test_rounding_twice_is_rounding_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all uniforms.

    A sum rounded to float64 and then to float32 differs from one rounded to float32 at once only if the first rounding
    ends on the middle between two float32 and was not exact.
    """
    fused = noise._fused_multiply_add

    def checked(a: Float32s, b: Float32s | float, c: Float32s | float) -> Float32s:
        product, addend = a.astype(np.float64) * np.asarray(b, np.float32), np.asarray(c, np.float32)
        total = product + addend
        part = total - product
        lost = (product - (total - part)) + (addend - part)  # Knuth's two-sum: exactly the rounding error
        in_the_middle = total.view(np.uint64) % 2**29 == 2**28
        assert not np.any(in_the_middle & (lost != 0))
        return fused(a, b, c)

    monkeypatch.setattr(noise, "_fused_multiply_add", checked)
    for uniform in (np.arange(2**24, dtype=np.uint32).astype(np.float32) * np.float32(2**-24)).reshape(16, -1):
        noise.cephes_log(1 - uniform)
        noise.cephes_sincos(np.float32(2 * math.pi) * uniform)

"""Logarithm, sine and cosine in float32, against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.sampling import cephes

Float32s = NDArray[np.float32]

# All that noise.py can ask about is 2^24 of each; every 7th, which is not a power of two, meets every binade.
UNIFORM = np.arange(0, 2**24, 7, dtype=np.uint32).astype(np.float32) * np.float32(2**-24)


def test_log_is_right_within_a_unit_in_the_last_place() -> None:
    x = 1 - UNIFORM
    found, expected = cephes.log(x), np.log(x.astype(np.float64))
    assert found.dtype == np.float32
    assert np.all(np.abs(found - expected) <= np.spacing(np.abs(expected).astype(np.float32)))


def test_sine_and_cosine_are_right_within_float32() -> None:
    angle = np.float32(2 * math.pi) * UNIFORM
    for found, expected in zip(cephes.sincos(angle), (np.sin, np.cos), strict=True):
        assert found.dtype == np.float32
        # Half a unit of numbers near 1, twice: a sine near a multiple of π is only as exact as the reduced angle.
        np.testing.assert_allclose(found, expected(angle.astype(np.float64)), rtol=0, atol=1.2e-7)


@pytest.mark.slow
def test_rounding_twice_is_rounding_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every uniform there is.

    A sum rounded to float64 and then to float32 differs from one rounded to float32 at once only if the first rounding
    ends on the middle between two float32 and was not exact.
    """
    fused = cephes._fused

    def checked(a: Float32s, b: Float32s | float, c: Float32s | float) -> Float32s:
        product, addend = a.astype(np.float64) * np.asarray(b, np.float32), np.asarray(c, np.float32)
        total = product + addend
        part = total - product
        lost = (product - (total - part)) + (addend - part)  # Knuth's two-sum: exactly what the rounding took away
        in_the_middle = total.view(np.uint64) % 2**29 == 2**28
        assert not np.any(in_the_middle & (lost != 0))
        return fused(a, b, c)

    monkeypatch.setattr(cephes, "_fused", checked)
    for uniform in (np.arange(2**24, dtype=np.uint32).astype(np.float32) * np.float32(2**-24)).reshape(16, -1):
        cephes.log(1 - uniform)
        cephes.sincos(np.float32(2 * math.pi) * uniform)

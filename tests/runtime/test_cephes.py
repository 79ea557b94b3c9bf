"""Logarithm, sine and cosine in float32, against float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt import cephes

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
    """For every uniform there is, beside fused operations computed with the 64-bit significand or a longer one."""
    assert np.finfo(np.longdouble).nmant >= 63
    uniforms = (np.arange(2**24, dtype=np.uint32).astype(np.float32) * np.float32(2**-24)).reshape(16, -1)

    def once(a: NDArray[np.float32], b: NDArray[np.float32] | float, c: NDArray[np.float32] | float) -> Any:
        product = a.astype(np.longdouble) * np.asarray(b, np.float32)
        return (product + np.asarray(c, np.float32)).astype(np.float32)

    for uniform in uniforms:
        angle = np.float32(2 * math.pi) * uniform
        found = cephes.log(1 - uniform), *cephes.sincos(angle)
        with monkeypatch.context() as patch:
            patch.setattr(cephes, "_fused", once)
            expected = cephes.log(1 - uniform), *cephes.sincos(angle)
        np.testing.assert_array_equal(found, expected)

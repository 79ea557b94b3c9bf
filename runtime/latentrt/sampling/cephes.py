"""Which logarithm, sine and cosine does torch make noise with?

Those of Cephes (S. Moshier, netlib.org/cephes, `logf`, `sinf` and `cosf`): polynomials in float32, evaluated as torch's
kernel for AVX2 does it (`aten/src/ATen/native/cpu/avx_mathfun.h`), where the compiler has fused products with the sums
that follow them. Here a fused one is computed in float64, in which a product of two float32 is exact, and
rounded to float32. All of it is plain IEEE arithmetic, so every machine gets the same bits.

That rounds the sum twice, which in principle can differ from once. A slow test shows that it does not for any of the
2²⁴ uniforms that `noise` can ask about.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["log", "sincos"]

Float32s = NDArray[np.float32]

_SQRT_HALF = np.float32(0.7071067811865476)
_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip
_LOG_2 = (0.693359375, -2.12194440e-4)  # log 2 in two parts, the first of which is short
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_FOUR_OVER_PI = np.float32(1.27323954473516)
_PI_OVER_FOUR = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)  # in three parts


def log(x: Float32s) -> Float32s:
    """The natural logarithm of normal positive numbers, float32."""
    mantissa, whole = np.frexp(x)  # mantissa in [0.5, 1)
    low = mantissa < _SQRT_HALF
    exponent = (whole - low).astype(np.float32)
    x = np.where(low, mantissa - np.float32(1) + mantissa, mantissa - np.float32(1))
    square = x * x
    y = _polynomial(_LOG, x) * x
    y = _fused(y, square, exponent * np.float32(_LOG_2[1]))
    y = _fused(square, -0.5, y)
    return _fused(exponent, _LOG_2[0], x + y)


def sincos(x: Float32s) -> tuple[Float32s, Float32s]:
    """Sine and cosine of angles from 0 to 2π, float32."""
    octant = (x * _FOUR_OVER_PI).astype(np.int32) + 1 & ~1  # of the nearest multiple of π/2
    for part in _PI_OVER_FOUR:
        x = _fused(octant.astype(np.float32), -part, x)
    square = x * x
    cosine = _polynomial(_COSINE, square) * square
    cosine = _fused(cosine, square, square * np.float32(-0.5)) + np.float32(1)
    sine = _fused(_polynomial(_SINE, square) * square, x, x)
    turned = octant & 2 != 0  # by a right angle, where each is the other
    s, c = np.where(turned, cosine, sine), np.where(turned, sine, cosine)
    return np.where(octant & 4 != 0, -s, s), np.where(octant + 2 & 4 != 0, -c, c)


def _polynomial(coefficients: tuple[float, ...], x: Float32s) -> Float32s:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fused(y, x, coefficient)
    return y


def _fused(a: Float32s, b: Float32s | float, c: Float32s | float) -> Float32s:
    """a · b + c, rounded once; numbers are rounded to float32 first."""
    product = a.astype(np.float64) * np.asarray(b, np.float32)
    total: Float32s = (product + np.asarray(c, np.float32)).astype(np.float32)
    return total

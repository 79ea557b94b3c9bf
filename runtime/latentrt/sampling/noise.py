"""Standard normal noise from a seed, equal to torch's.

torch's generator on the CPU is the 32-bit Mersenne Twister (Matsumoto and Nishimura 1998) with two implementations of
the Box-Muller transform (1958); the number of values requested decides which one runs. The references are `normal_fill`
in `aten/src/ATen/native/cpu/DistributionTemplates.h` and `normal_distribution` in
`aten/src/ATen/core/DistributionsHelper.h`.

The values are those of torch's kernel for AVX2 to the bit, on every machine. On one without AVX2 (ARM), torch's own
differ from them by up to 2.4e-6. Requests of fewer than 16 values, which no latents are, use the C library's logarithm
and sine, so that their last bit may depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.printable import quote
from latentrt.errors import RequestError

__all__ = ["Generator", "cephes_log", "cephes_sincos", "draw"]

Float32s = NDArray[np.float32]

SEED_BITS = 64
BLOCK = 16  # torch's vectorised kernel makes values in blocks of this size; smaller requests take the scalar one

_TWO_PI = np.float32(2.0 * math.pi)


class Generator:
    """A stream of standard normal numbers, equal to `torch.Generator("cpu").manual_seed(seed)`.

    Args:
        seed: 0 to 2⁶⁴ − 1. As in torch, only its low 32 bits count.

    Raises:
        RequestError: the seed is not such a number.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**SEED_BITS:
            raise RequestError(f"`seed`: got {quote(seed)}, expected a whole number from 0 to 2**{SEED_BITS} - 1")
        self._twister = np.random.RandomState(int(seed) % 2**32)
        self._spare: float | None = None

    def normal(self, shape: Sequence[int]) -> Float32s:
        """Return the next noise array, float32, as `torch.randn(shape, generator=…)` does."""
        count = math.prod(shape)
        values = self._fill_blocks(count) if count >= BLOCK else self._fill_scalars(count)
        return values.reshape(shape)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    def _fill_blocks(self, count: int) -> Float32s:
        whole = count - count % BLOCK
        words = self._words(count)
        values = np.empty(count, np.float32)
        values[:whole] = _box_muller(words[:whole])
        if whole < count:
            # torch makes the last BLOCK values anew, from fresh words, where the count is not a multiple of BLOCK.
            values[-BLOCK:] = _box_muller(self._words(BLOCK))
        return values

    def _fill_scalars(self, count: int) -> Float32s:
        return np.array([self._one() for _ in range(count)], np.float32)

    def _one(self) -> float:
        """Return one number, in float64. Numbers are computed in pairs; the second is kept for the next call."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        theta = 2.0 * math.pi * self._uniform()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform()))
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)

    def _uniform(self) -> float:
        """Return 53 bits in [0, 1), of two words with the high one first."""
        high, low = (int(word) for word in self._words(2))
        return ((high << 32 | low) % 2**53) * 2.0**-53


def draw(generators: Sequence[Generator], shape: Sequence[int]) -> Float32s:
    """Return the next noise of each generator: float32 [len(generators), *shape].

    Each image of a batch has its own generator, so its noise does not depend on the batch.
    """
    return np.stack([generator.normal(shape) for generator in generators])


def _box_muller(words: NDArray[np.uint32]) -> Float32s:
    """Map words [16·n] to standard normal numbers [16·n]; in a block, the first eight pair with the last eight."""
    uniform = (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)  # [0, 1) in 24 bits
    u1, u2 = uniform.reshape(-1, 2, BLOCK // 2).swapaxes(0, 1)  # each (n, 8)
    radius = np.sqrt(np.float32(-2) * cephes_log(1 - u1))  # the logarithm of (0, 1]
    sine, cosine = cephes_sincos(_TWO_PI * u2)
    normal: Float32s = np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)
    return normal + np.float32(0)  # the mean: adding it turns −0 into +0


# Logarithm, sine and cosine of Cephes (S. Moshier, netlib.org/cephes, `logf`, `sinf` and `cosf`): polynomials in
# float32, evaluated as torch's kernel for AVX2 does (`aten/src/ATen/native/cpu/avx_mathfun.h`), where the compiler has
# fused products with the sums that follow. Here a fused multiply-add is computed in float64, in which the product of
# two float32 is exact, and rounded to float32. All of it is plain IEEE arithmetic, so every machine gets the same bits.
# The sum is rounded twice, which in principle can differ from rounding once; a slow test shows that it does not for any
# of the 2²⁴ uniforms.

_SQRT_HALF = np.float32(0.7071067811865476)
_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
        2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip
_LOG_2 = (0.693359375, -2.12194440e-4)  # log 2 in two parts, the first of which is short
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_FOUR_OVER_PI = np.float32(1.27323954473516)
_PI_OVER_FOUR = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)  # in three parts


def cephes_log(x: Float32s) -> Float32s:
    """Return the natural logarithm of normal positive numbers, float32."""
    mantissa, whole = np.frexp(x)  # mantissa in [0.5, 1)
    low = mantissa < _SQRT_HALF
    exponent = (whole - low).astype(np.float32)
    x = np.where(low, mantissa - np.float32(1) + mantissa, mantissa - np.float32(1))
    square = x * x
    y = _polynomial(_LOG, x) * x
    y = _fused_multiply_add(y, square, exponent * np.float32(_LOG_2[1]))
    y = _fused_multiply_add(square, -0.5, y)
    return _fused_multiply_add(exponent, _LOG_2[0], x + y)


def cephes_sincos(x: Float32s) -> tuple[Float32s, Float32s]:
    """Return sine and cosine of angles from 0 to 2π, float32."""
    octant = (x * _FOUR_OVER_PI).astype(np.int32) + 1 & ~1  # of the nearest multiple of π/2
    for part in _PI_OVER_FOUR:
        x = _fused_multiply_add(octant.astype(np.float32), -part, x)
    square = x * x
    cosine = _polynomial(_COSINE, square) * square
    cosine = _fused_multiply_add(cosine, square, square * np.float32(-0.5)) + np.float32(1)
    sine = _fused_multiply_add(_polynomial(_SINE, square) * square, x, x)
    swapped = octant & 2 != 0  # odd multiples of π/2 exchange sine and cosine
    s, c = np.where(swapped, cosine, sine), np.where(swapped, sine, cosine)
    return np.where(octant & 4 != 0, -s, s), np.where(octant + 2 & 4 != 0, -c, c)


def _polynomial(coefficients: tuple[float, ...], x: Float32s) -> Float32s:
    y = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fused_multiply_add(y, x, coefficient)
    return y


def _fused_multiply_add(a: Float32s, b: Float32s | float, c: Float32s | float) -> Float32s:
    """Return a · b + c, rounded once; Python numbers are rounded to float32 first."""
    product = a.astype(np.float64) * np.asarray(b, np.float32)
    total: Float32s = (product + np.asarray(c, np.float32)).astype(np.float32)
    return total

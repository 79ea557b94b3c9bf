"""seed → noise, the same as torch's.

torch's generator on the CPU is the 32-bit Mersenne Twister (Matsumoto and Nishimura 1998) with two ways of making
normal numbers of it, both Box-Muller (1958); which of them it takes depends on how many are asked for at once. The
references are `normal_fill` in `aten/src/ATen/native/cpu/DistributionTemplates.h` and `normal_distribution` in
`aten/src/ATen/core/DistributionsHelper.h`.

The numbers are those of torch's kernel for AVX2 to the bit, here on every machine. On one without AVX2 torch's own are
up to 2.4e-6 away from them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling import cephes

__all__ = ["Generator", "draw"]

SEED_BITS = 64
BLOCK = 16  # torch's kernel makes normal numbers in blocks of this many, and goes another way for fewer

_TWO_PI = np.float32(2.0 * math.pi)


class Generator:
    """What `torch.Generator("cpu").manual_seed(seed)` is: a stream of standard normal numbers.

    Args:
        seed: 0 to 2⁶⁴ − 1. Like torch, only its low 32 bits count.

    Raises:
        RequestError: the seed is not such a number.
    """

    def __init__(self, seed: int) -> None:
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**SEED_BITS:
            raise RequestError(f"found seed {seed!r}, expected a whole number from 0 to 2**{SEED_BITS} - 1")
        self._twister = np.random.RandomState(int(seed) % 2**32)
        self._spare: float | None = None

    def normal(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The next draw: what `torch.randn(shape, generator=…)` returns, float32."""
        count = math.prod(shape)
        values = self._blocks(count) if count >= BLOCK else self._pairs(count)
        return values.reshape(shape)

    def _words(self, count: int) -> NDArray[np.uint32]:
        return self._twister.randint(0, 2**32, size=count, dtype=np.uint32)

    def _blocks(self, count: int) -> NDArray[np.float32]:
        whole = count - count % BLOCK
        words = self._words(count)
        values = np.empty(count, np.float32)
        values[:whole] = _box_muller(words[:whole])
        if whole < count:
            # torch makes the ragged end, and what it overlaps of the last whole block, once more from fresh words.
            values[-BLOCK:] = _box_muller(self._words(BLOCK))
        return values

    def _pairs(self, count: int) -> NDArray[np.float32]:
        return np.array([self._one() for _ in range(count)], np.float32)

    def _one(self) -> float:
        """One number, in float64. They come in pairs, and the second waits for the next small draw."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        theta = 2.0 * math.pi * self._uniform()
        radius = math.sqrt(-2.0 * math.log1p(-self._uniform()))
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)

    def _uniform(self) -> float:
        """53 bits in [0, 1), of two words with the high one first."""
        high, low = (int(word) for word in self._words(2))
        return ((high << 32 | low) % 2**53) * 2.0**-53


def draw(generators: Sequence[Generator], shape: Sequence[int]) -> NDArray[np.float32]:
    """One draw from each generator: float32 [len(generators), *shape].

    Each image of a batch has its own generator, so it gets the noise that it would get alone.
    """
    return np.stack([generator.normal(shape) for generator in generators])


def _box_muller(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    """32-bit words [16·n] → standard normal numbers [16·n]: in each block the first eight pair with the last eight."""
    uniform = (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)  # [0, 1) in 24 bits
    u1, u2 = uniform.reshape(-1, 2, BLOCK // 2).swapaxes(0, 1)  # each (n, 8)
    radius = np.sqrt(np.float32(-2) * cephes.log(1 - u1))  # the logarithm of (0, 1]
    sine, cosine = cephes.sincos(_TWO_PI * u2)
    normal: NDArray[np.float32] = np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)
    return normal + np.float32(0)  # the mean: adding it makes every zero a positive one

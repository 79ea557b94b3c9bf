"""Where has a beta distribution that much of its probability?

The beta grid of noise levels asks it (`sigmas.beta`). The regularised incomplete beta function is its power series
(Abramowitz and Stegun 26.5.23), which on [0, 1/2] gains a binary digit with every term; the other half of the interval
is the mirror image of it. The inverse is Newton's.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

__all__ = ["quantile"]

Float64s = NDArray[np.float64]

_TERMS = 64  # 2⁻⁶⁴ is below the last place of float64
_ITERATIONS = 60


def quantile(probability: Float64s, alpha: float, beta: float) -> Float64s:
    """The x in 0 … 1 below which a beta distribution has this much probability, float64.

    Args:
        probability: 0 … 1, of any shape.
        alpha, beta: the distribution's parameters, both above 0 and up to 1.
    """
    middle = _distribution(np.array(0.5), alpha, beta)
    left = probability <= middle
    return np.where(
        left,
        _left_quantile(np.where(left, probability, 0), alpha, beta),
        1 - _left_quantile(np.where(left, 0, 1 - probability), beta, alpha),
    )


def _left_quantile(probability: Float64s, alpha: float, beta: float) -> Float64s:
    """The quantile where it is at most 1/2."""
    # As if the density were that near 0, x^(α−1) / B: from there Newton's method comes down without overshooting.
    x = np.minimum((probability * alpha * _complete(alpha, beta)) ** (1 / alpha), 0.5)
    for _ in range(_ITERATIONS):
        positive = np.where(x > 0, x, 0.5)
        density = positive ** (alpha - 1) * (1 - positive) ** (beta - 1) / _complete(alpha, beta)
        step = np.where(x > 0, (_distribution(positive, alpha, beta) - probability) / density, 0)
        x = np.clip(x - step, x / 8, 0.5)
        if np.all(np.abs(step) <= np.spacing(x)):
            break
    return x


def _distribution(x: Float64s, alpha: float, beta: float) -> Float64s:
    """The probability below x, for 0 ≤ x ≤ 1/2."""
    total, term = np.zeros_like(x), np.ones_like(x)
    for n in range(_TERMS):
        total = total + term / (alpha + n)
        term = term * x * (n + 1 - beta) / (n + 1)
    below: Float64s = x**alpha * total / _complete(alpha, beta)
    return below


def _complete(alpha: float, beta: float) -> float:
    return math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)

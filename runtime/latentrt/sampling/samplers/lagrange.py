"""What does a multistep method weigh its remembered values with?

Adams' methods put a polynomial through the values at the last few points and integrate it over the next step, here
against an exponential, as exponential integrators do (Hochbruck and Ostermann 2010). The integrals are taken by
Gauss-Legendre quadrature, which for such smooth functions is exact to rounding and, unlike their closed forms, loses
nothing where the points lie close together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["adams_weights"]

Float64s = NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def adams_weights(points: Float64s, start: Float64s, end: Float64s, rate: float = 0.0) -> Float64s:
    """∫ e^{rate · (v − end)} · l_i(v) dv from `start` to `end`, for each Lagrange polynomial l_i through the points.

    Args:
        points: the points of each row, all different, [N, order].
        start, end: [N].
        rate: of the exponential.

    Returns:
        [N, order].
    """
    half = (end - start)[:, np.newaxis] / 2
    v = start[:, np.newaxis] + half * (1 + _NODES)  # (N, nodes)
    measure = half * _WEIGHTS * np.exp(rate * (v - end[:, np.newaxis]))
    weights = np.empty_like(points)
    for i in range(points.shape[1]):
        others = np.delete(points, i, axis=1)[:, np.newaxis]  # (N, 1, order − 1)
        basis = np.prod((v[..., np.newaxis] - others) / (points[:, i, np.newaxis, np.newaxis] - others), axis=-1)
        weights[:, i] = np.sum(measure * basis, axis=1)
    return weights

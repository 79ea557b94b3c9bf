"""Weights of linear multistep methods: Adams-Bashforth, exponential Adams, and a predictor fused with a corrector."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["ADAMS_BASHFORTH", "adams_weights", "fuse_corrector"]

Float64s = NDArray[np.float64]

# By order, newest first, for equal steps (Hairer, Nørsett and Wanner 1993, section III.1).
ADAMS_BASHFORTH = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)


def adams_weights(points: Float64s, start: Float64s, end: Float64s, rate: float = 0.0) -> Float64s:
    """Return ∫ e^{rate · (v − end)} · l_i(v) dv from `start` to `end`, for each Lagrange polynomial l_i.

    Adams methods integrate the polynomial through the last values over the next step, exponential integrators against
    an exponential (Hochbruck and Ostermann 2010). Gauss-Legendre quadrature is exact to rounding for such smooth
    functions and, unlike the closed forms, loses no digits where the points are close together.

    Args:
        points: the distinct points of each row, [N, order].
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


def fuse_corrector(a: Float64s, predictor: Float64s, corrector: Float64s, corrects: NDArray[np.bool_]) -> Float64s:
    """Return the column b of a predictor-corrector method that evaluates the model once per step.

    A step is predicted from the last latents, corrected with the model output there, and the next step is predicted
    from the corrected latents. Predictor and corrector have the same factor of x and the same noise, so the correction
    is a sum over the history, which the next prediction includes:

        x_k'    = x_k + Σ_j (C_j − P_{j−1}) · h_{k−j}           corrected
        x_{k+1} = a · x_k' + Σ_j P_j · h_{k−j} + …              predicted

    Args:
        a: the factor of x in each row's prediction, [N].
        predictor: P of each row, newest first, [N, M].
        corrector: C of each row, of the step that led to it, [N, M + 1].
        corrects: whether a row corrects, [N].

    Returns:
        [N, M + 1].
    """
    before = np.vstack([np.zeros(predictor.shape[1]), predictor[:-1]])  # the weights that predicted this row's latents
    correction = corrector.copy()
    correction[:, 1:] -= before
    correction[~corrects] = 0
    weights = a[:, np.newaxis] * correction
    weights[:, :-1] += predictor
    return weights

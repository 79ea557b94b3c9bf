"""The weights of Adams methods against integrals of 50 digits (mpmath)."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest

from latentrt.sampling.samplers.multistep import adams_weights


def exact(points: list[float], start: float, end: float, rate: float) -> list[float]:
    """Return ∫ e^{rate · (v − end)} · l_i(v) dv for each i."""
    with mpmath.workdps(50):
        known = [mpmath.mpf(point) for point in points]

        def basis(i: int, v: Any) -> Any:
            others = [point for j, point in enumerate(known) if j != i]
            return mpmath.fprod((v - point) / (known[i] - point) for point in others)

        return [
            float(mpmath.quad(lambda v, i=i: mpmath.exp(rate * (v - end)) * basis(i, v), [start, end]))
            for i in range(len(known))
        ]


@pytest.mark.parametrize("rate", [0.0, 1.0, 2.0, -1.0])
@pytest.mark.parametrize("spacing", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_are_exact_also_where_points_crowd(order: int, spacing: float, rate: float) -> None:
    """Where diffusers' closed forms lose all digits: 999 beta sigmas are this close at the noisy end, and there
    SA-Solver's of order 4 differ from these by 3e-2."""
    # Exact differences, so that nothing is lost before the method begins.
    step = float(2.0 ** np.round(np.log2(spacing)))
    points = [-2.0 - step * factor for factor in (0.0, 1.0, 1.75, 3.0)][:order]
    start, end = points[0], points[0] + 1.25 * step
    found = adams_weights(np.array([points]), np.array([start]), np.array([end]), rate)[0]
    expected = exact(points, start, end, rate)
    # The float64 error of differences of numbers near 2.
    tolerance = 1e-13 + 1e-15 / step
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * float(np.max(np.abs(expected))))

"""Weights of Adams methods and coefficients of DPM-Solver against 50 digits (mpmath)."""

from __future__ import annotations

from typing import Any, get_args

import mpmath
import numpy as np
import pytest

from latentrt.sampling.samplers.dpm_solver import Algorithm, solver_step
from latentrt.sampling.samplers.log_snr import NoiseGrid
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


@pytest.mark.parametrize("h", [3.0, 1.0, 0.999, 0.1, 1e-3, 1e-5, 1e-9, 0.0])
@pytest.mark.parametrize("algorithm", get_args(Algorithm))
def test_coefficients_of_dpm_solver_are_exact_also_in_short_steps(algorithm: Algorithm, h: float) -> None:
    """Where diffusers' closed forms of order 3 have no digit left: of two steps of 1e-5, as 999 beta sigmas are."""
    after = NoiseGrid(np.array([0.75]), np.array([0.8]), np.array([0.6]))
    step = solver_step(algorithm, after, np.array([h]), np.array([1.1]), np.array([0.9]))
    with mpmath.workdps(50):
        rate = (-2 if algorithm == "sde-dpmsolver++" else -1) if algorithm.endswith("++") else 1
        x = rate * mpmath.mpf(h)
        scale = -0.8 if algorithm.endswith("++") else -1.2 if algorithm == "sde-dpmsolver" else -0.6
        d0 = mpmath.expm1(x)
        d1 = mpmath.expm1(x) / x - 1 if h else 0
        d2 = (mpmath.expm1(x) - x) / x**2 - 0.5 if h else 0
        if algorithm == "sde-dpmsolver++":
            d2 += 1  # as diffusers, whose ½ has the other sign
        expected = [float(scale * each) for each in (d0, d1, d2)]
    # Of some float64 operations; closed forms of x = 1 lose another digit.
    np.testing.assert_allclose([*step.d0, *step.d1, *step.d2], expected, rtol=2e-15, atol=0)

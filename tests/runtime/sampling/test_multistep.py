from __future__ import annotations

import numpy as np
import pytest

from latentrt.sampling.samplers.multistep import ADAMS_BASHFORTH, adams_weights, fuse_corrector


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_equal_steps_give_the_weights_of_adams_and_bashforth(order: int) -> None:
    points = -np.arange(order, dtype=np.float64)[np.newaxis]
    weights = adams_weights(points, np.array([0.0]), np.array([1.0]))[0]
    np.testing.assert_allclose(weights, ADAMS_BASHFORTH[order - 1], rtol=1e-12)


def test_a_constant_is_integrated_against_the_exponential() -> None:
    """Of order 1: ∫ e^(rate · (v − end)) dv."""
    weights = adams_weights(np.array([[0.3]]), np.array([0.3]), np.array([0.8]), rate=2.0)
    np.testing.assert_allclose(weights, [[(1 - np.exp(-1.0)) / 2]], rtol=1e-14)


def test_a_fused_corrector_is_a_predictor_after_a_corrector() -> None:
    """Against the two-phase method that it replaces, with an arbitrary model output in each row."""
    rng = np.random.default_rng(1)
    rows, memory = 5, 2
    a, predictor, corrector = rng.random(rows), rng.random((rows, memory)), rng.random((rows, memory + 1))
    for k in range(memory):
        predictor[k, k + 1 :] = corrector[k, k + 1 :] = 0  # the history is shorter than that
    corrects = np.array([False, True, True, False, True])
    h = rng.random(rows)

    b = fuse_corrector(a, predictor, corrector, corrects)
    x, expected = 1.0, 1.0
    for k in range(rows):
        past = h[k::-1]
        x = a[k] * x + sum(weight * value for weight, value in zip(b[k], past, strict=False))
        if corrects[k]:
            predicted = sum(weight * value for weight, value in zip(predictor[k - 1], past[1:], strict=False))
            expected += sum(weight * value for weight, value in zip(corrector[k], past, strict=False)) - predicted
        expected = a[k] * expected + sum(weight * value for weight, value in zip(predictor[k], past, strict=False))
        assert x == pytest.approx(expected, rel=1e-12)

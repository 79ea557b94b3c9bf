"""The pairs that turn a model's output into x0 and epsilon."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.errors import RequestError
from latentrt.sampling import prediction

numbers = st.floats(-3, 3)


@settings(deadline=None)
@given(x0=numbers, epsilon=numbers, angle=st.floats(0.01, 1.56), norm=st.sampled_from([1.0, 14.6]))
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_both_unknowns_come_back(
    prediction_type: prediction.PredictionType, x0: float, epsilon: float, angle: float, norm: float
) -> None:
    unit_alpha, unit_sigma = np.array([np.cos(angle)]), np.array([np.sin(angle)])
    alpha, sigma = norm * unit_alpha, norm * unit_sigma
    x = alpha * x0 + sigma * epsilon
    m = {
        "epsilon": np.array([epsilon]),
        "sample": np.array([x0]),
        "v_prediction": unit_alpha * epsilon - unit_sigma * x0,
    }[prediction_type]
    for pair, expected in ((prediction.x0, x0), (prediction.epsilon, epsilon)):
        p, q = pair(prediction_type, alpha, sigma)
        # float64, after division by as little as cos 1.56 = 0.01.
        np.testing.assert_allclose(p * x + q * m, expected, atol=1e-12)


def test_pure_noise_says_nothing_of_the_picture() -> None:
    with pytest.raises(RequestError, match="use 'v_prediction'"):
        prediction.x0("epsilon", np.array([0.0]), np.array([1.0]))

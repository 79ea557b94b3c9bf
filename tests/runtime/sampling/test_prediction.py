from __future__ import annotations

import numpy as np
import pytest

from latentrt.errors import RequestError
from latentrt.sampling import prediction


@pytest.mark.parametrize("norm", [1.0, 14.6])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_x0_and_epsilon_are_recovered(prediction_type: prediction.PredictionType, norm: float) -> None:
    rng = np.random.default_rng(0)
    x0, epsilon, angle = rng.uniform(-3, 3, 100), rng.uniform(-3, 3, 100), rng.uniform(0.01, 1.56, 100)
    alpha, sigma = norm * np.cos(angle), norm * np.sin(angle)
    x = alpha * x0 + sigma * epsilon
    m = {
        "epsilon": epsilon,
        "sample": x0,
        "v_prediction": np.cos(angle) * epsilon - np.sin(angle) * x0,
        "flow_prediction": epsilon - x0,
    }[prediction_type]
    for pair, expected in ((prediction.x0, x0), (prediction.epsilon, epsilon)):
        p, q = pair(prediction_type, alpha, sigma)
        # float64, after division by as little as cos 1.56 = 0.01.
        np.testing.assert_allclose(p * x + q * m, expected, atol=1e-12)


def test_epsilon_does_not_determine_x0_in_pure_noise() -> None:
    with pytest.raises(RequestError, match="`prediction_type`"):
        prediction.x0("epsilon", np.array([0.0]), np.array([1.0]))

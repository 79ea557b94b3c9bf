"""What does a model's output say of the picture?

A latent is x = α·x0 + σ·ε. Whichever of the two unknowns, or mixture of them, a model was trained to predict, the
other follows linearly from it and x. So each answer here is a pair (p, q) to be read as `p·x + q·m`, with m the
model's output.

The pairs hold for any scale of x: α² + σ² = 1 as in Ho et al. 2020, or α = 1 as in Karras et al. 2022. v is always
that of the unit-norm latent: v = (α·ε − σ·x0) / √(α² + σ²) (Salimans and Ho 2022, appendix D). A flow's velocity is
ε − x0 (Lipman et al. 2022, Liu et al. 2022), whatever the scale; along a straight flow α + σ = 1.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError

__all__ = ["Pair", "PredictionType", "epsilon", "x0"]

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
Pair = tuple[NDArray[np.float64], NDArray[np.float64]]


def x0(prediction_type: PredictionType, alpha: NDArray[np.float64], sigma: NDArray[np.float64]) -> Pair:
    """The pair (p, q) with x0 = p·x + q·m.

    Args:
        prediction_type: what the model was trained to predict (`sample` is x0 itself).
        alpha: how much of x0 is in x, of any shape.
        sigma: how much of ε is in x, of the same shape.

    Raises:
        RequestError: x0 is asked of a model that predicts ε where x holds nothing of x0 (α = 0).
    """
    if prediction_type == "sample":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction_type == "v_prediction":
        norm = np.hypot(alpha, sigma)
        return alpha / norm**2, -sigma / norm
    if prediction_type == "flow_prediction":
        return 1 / (alpha + sigma), -sigma / (alpha + sigma)
    if not np.all(alpha):
        raise RequestError(
            "found prediction_type 'epsilon' and a first step of pure noise (rescale_betas_zero_snr), where it says "
            "nothing of the picture; use 'v_prediction' if the model was trained with it, or timestep_spacing 'leading'"
        )
    return 1 / alpha, -sigma / alpha


def epsilon(prediction_type: PredictionType, alpha: NDArray[np.float64], sigma: NDArray[np.float64]) -> Pair:
    """The pair (p, q) with ε = p·x + q·m; arguments as those of `x0`, with σ > 0."""
    if prediction_type == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction_type == "v_prediction":
        norm = np.hypot(alpha, sigma)
        return sigma / norm**2, alpha / norm
    if prediction_type == "flow_prediction":
        return 1 / (alpha + sigma), alpha / (alpha + sigma)
    return 1 / sigma, -alpha / sigma

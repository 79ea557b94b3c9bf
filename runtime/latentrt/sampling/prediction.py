"""x0 and ε as linear functions of the latents and the model output, for each prediction type.

Latents are x = α·x0 + σ·ε. Whether a model was trained to predict x0, ε or a mixture of them, both follow linearly from
its output and x. So each function returns a pair (p, q), meaning `p·x + q·m` with m the model output.

The pairs hold for any scale of x: α² + σ² = 1 as in Ho et al. 2020, or α = 1 as in Karras et al. 2022. v is that of the
unit-norm latents: v = (α·ε − σ·x0) / √(α² + σ²) (Salimans and Ho 2022, appendix D). A flow's velocity is ε − x0 (Lipman
et al. 2022, Liu et al. 2022), for any scale; along a straight flow α + σ = 1.
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
    """Return the pair (p, q) with x0 = p·x + q·m.

    Args:
        prediction_type: the target that the model was trained to predict (`sample` is x0 itself).
        alpha: the factor of x0 in x, of any shape.
        sigma: the factor of ε in x, of the same shape.

    Raises:
        RequestError: the model predicts ε, and some x contains nothing of x0 (α = 0).
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
            "`prediction_type` 'epsilon' does not determine x0 in a first step of pure noise "
            "(`rescale_betas_zero_snr`); set it to 'v_prediction' if the model was trained with that, or set "
            "`timestep_spacing` to 'leading'"
        )
    return 1 / alpha, -sigma / alpha


def epsilon(prediction_type: PredictionType, alpha: NDArray[np.float64], sigma: NDArray[np.float64]) -> Pair:
    """Return the pair (p, q) with ε = p·x + q·m; arguments as those of `x0`, with σ > 0."""
    if prediction_type == "epsilon":
        return np.zeros_like(alpha), np.ones_like(alpha)
    if prediction_type == "v_prediction":
        norm = np.hypot(alpha, sigma)
        return sigma / norm**2, alpha / norm
    if prediction_type == "flow_prediction":
        return 1 / (alpha + sigma), alpha / (alpha + sigma)
    return 1 / sigma, -alpha / sigma

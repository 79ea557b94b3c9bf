"""A probability flow with a known solution, and the error of a schedule on it.

Where every coordinate of the data is normal, N(μ, s²), latents α·x0 + σ·ε are N(αμ, α²s² + σ²). The flow carries each
quantile of one noise level to the same quantile of the next, so (x − αμ) / √(α²s² + σ²) is constant, and the ideal
model is linear: E[x0 | x] = μ + αs² (x − αμ) / (α²s² + σ²). The ODE is linear too and its solution is known, but no
solver follows it exactly unless s is 0.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.schedule import Recurrence, Schedule

__all__ = ["EDM_SIGMA_DATA", "Predicts", "exact", "final_error", "model"]

Float64s = NDArray[np.float64]
Predicts = Literal["epsilon", "v", "velocity", "edm"]

# Deviations below and above the usual one, so that coordinates change from noise to image at different noise levels,
# and no solver is exact by chance in all of them.
DEVIATION = np.geomspace(0.1, 2, 8)
MEAN = np.linspace(-1, 1, 8)
QUANTILE = 1.0  # in deviations above the mean
EDM_SIGMA_DATA = 0.5


def exact(alpha: float, sigma: float) -> Float64s:
    """Return the solution at a noise level, [8]."""
    return alpha * MEAN + QUANTILE * np.sqrt((alpha * DEVIATION) ** 2 + sigma**2)


def model(predicts: Predicts, x: Float64s, alpha: float, sigma: float) -> Float64s:
    """Return the output of the ideal model for latents x.

    Args:
        predicts: the target of training: ε; v of Salimans and Ho 2022, where α² + σ² = 1; a velocity ε − x0 of a flow;
            or the network output of Karras et al. 2022, table 1.
        x: [8], of any scale.
        alpha, sigma: the factors of x0 and ε in x.
    """
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    x0 = MEAN + alpha * DEVIATION**2 / variance * (x - alpha * MEAN)
    if predicts == "edm":
        noise = sigma / alpha
        c_skip = EDM_SIGMA_DATA**2 / (noise**2 + EDM_SIGMA_DATA**2)
        c_out: float = noise * EDM_SIGMA_DATA / np.hypot(noise, EDM_SIGMA_DATA)
        return (x0 - c_skip * x / alpha) / c_out
    epsilon = (x - alpha * x0) / sigma
    if predicts == "v":
        return alpha * epsilon - sigma * x0
    return epsilon - x0 if predicts == "velocity" else epsilon


def final_error(schedule: Schedule, predicts: Predicts, *, given: int, stop: int) -> float:
    """Run a schedule in float64 up to row `stop` and return the relative error of the latents there.

    Args:
        schedule: the table; deterministic and without limits.
        predicts: the prediction type of its model.
        given: the latents and the history up to this row are exact; at least 0.
        stop: the row before which latents are compared.

    Raises:
        ValueError: the schedule adds noise or clips.
    """
    if np.any(schedule.s) or np.any(np.isfinite(schedule.limit)):
        raise ValueError("the schedule adds noise or clips; expected one that solves the probability flow")
    recurrence: Any = Recurrence(schedule, np.float64)  # of float64 latents
    x: Any = exact(schedule.alpha[0], schedule.sigma[0])
    for k in range(stop):
        alpha, sigma, c_in = schedule.alpha[k], schedule.sigma[k], schedule.c_in[k]
        if k <= given:
            x = exact(alpha, sigma)
        x = recurrence.step(k, x, model(predicts, recurrence.model_input(k, x), c_in * alpha, c_in * sigma))
    solution = exact(schedule.alpha[stop], schedule.sigma[stop])
    return float(np.linalg.norm(x - solution) / np.linalg.norm(solution))

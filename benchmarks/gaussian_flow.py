"""Which probability flow has a known solution, and how far from it does a table of coefficients end?

Where every coordinate of the data is normal, N(μ, s²), a latent α·x0 + σ·ε is N(αμ, α²s² + σ²). The flow carries each
quantile of one noise level to the same quantile of the next, so (x − αμ) / √(α²s² + σ²) stays what it is, and the ideal
model is linear: E[x0 | x] = μ + αs² (x − αμ) / (α²s² + σ²). The ODE is linear too and its solution is known, but none
of the solvers follows it exactly unless s is 0.
"""

from __future__ import annotations

from collections import deque
from itertools import zip_longest
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.schedule import Schedule

__all__ = ["EDM_SIGMA_DATA", "Predicts", "exact", "final_error", "model"]

Float64s = NDArray[np.float64]
Predicts = Literal["epsilon", "v", "velocity", "edm"]

# Data both narrower and wider than is usual, so that a coordinate turns from noise to picture at every level between,
# and no solver is right by chance in all of them.
DEVIATION = np.geomspace(0.1, 2, 8)
MEAN = np.linspace(-1, 1, 8)
QUANTILE = 1.0  # in deviations above the mean
EDM_SIGMA_DATA = 0.5


def exact(alpha: float, sigma: float) -> Float64s:
    """The solution at a level, [8]."""
    return alpha * MEAN + QUANTILE * np.sqrt((alpha * DEVIATION) ** 2 + sigma**2)


def model(predicts: Predicts, x: Float64s, alpha: float, sigma: float) -> Float64s:
    """What the ideal model says of the latent x at this level.

    Args:
        predicts: what it was trained to say: ε; v of Salimans and Ho 2022, where α² + σ² = 1; the velocity ε − x0 of a
            flow; or the network output of Karras et al. 2022, table 1.
        x: [8], of any scale, and
        alpha, sigma: how much of x0 and of ε is in it at that scale.
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
    """Run a table in float64 from its first row up to row `stop`; the relative error of the latent there.

    Args:
        schedule: the table; deterministic and without limits.
        predicts: what its model says.
        given: the latents up to this row are the exact ones, whatever the table made of them, and so is what it
            remembers of them. At least row 0 is given.
        stop: a row whose latent is wanted.

    Raises:
        ValueError: the table adds noise or clips.
    """
    if np.any(schedule.s) or np.any(np.isfinite(schedule.limit)):
        raise ValueError("found a table that adds noise or clips, expected one that solves the probability flow")
    x = previous = exact(schedule.alpha[0], schedule.sigma[0])
    history: deque[Float64s] = deque(maxlen=schedule.memory)  # newest first
    for k in range(stop):
        alpha, sigma, c_in = schedule.alpha[k], schedule.sigma[k], schedule.c_in[k]
        if k <= given:
            x = exact(alpha, sigma)
        m = model(predicts, c_in * x, c_in * alpha, c_in * sigma)
        history.appendleft(schedule.u[k] * x + schedule.w[k] * (schedule.p[k] * x + schedule.q[k] * m))
        remembered = sum(weight * h for weight, h in zip_longest(schedule.b[k], history, fillvalue=0.0) if weight)
        x, previous = schedule.a[k] * x + schedule.e[k] * previous + schedule.d[k] * m + remembered, x
    solution = exact(schedule.alpha[stop], schedule.sigma[stop])
    return float(np.linalg.norm(x - solution) / np.linalg.norm(solution))

"""What does one step of DPM-Solver weigh x0, or ε, and its slopes over λ with?

Lu et al. 2022 (https://arxiv.org/abs/2206.00927, DPM-Solver, in ε) and its sequel (https://arxiv.org/abs/2211.01095,
DPM-Solver++, in x0), for the probability flow and for the reverse SDE, which forgets twice as fast: h counts twice
there, and noise is added.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling.samplers.log_snr import Levels, check_levels_differ

__all__ = ["Algorithm", "Step", "check_final_level", "multistep_weights", "solver_step"]

Float64s = NDArray[np.float64]
Algorithm = Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]


class Step(NamedTuple):
    """x' = keep·x + value·D0 + slope·D1 + curve·D2 + noise·z, each [N].

    D0 is x0 or ε itself, D1 and D2 its first and second differences over λ, in units of the step. `half` takes the
    place of `slope` in methods of the midpoint type.
    """

    keep: Float64s
    value: Float64s
    half: Float64s
    slope: Float64s
    curve: Float64s
    noise: Float64s


def solver_step(algorithm: Algorithm, there: Levels, h: Float64s, keep_alpha: Float64s, keep_sigma: Float64s) -> Step:
    """The coefficients of a step.

    Args:
        algorithm: in x0 (`++`) or in ε, with noise (`sde-`) or without.
        there: the noise after it.
        h: its length in λ; may be infinite in x0. Where rounding has the last step go back a little, no noise is added.
        keep_alpha, keep_sigma: α and σ after it in parts of those before.
    """
    noisy, in_x0 = algorithm.startswith("sde"), algorithm.endswith("++")
    if in_x0:
        length = 2 * h if noisy else h
        gone = -np.expm1(-length)
        slope = there.alpha * (1 - _over(gone, length, 1.0))
        finite = np.where(np.isfinite(length), length, 0)  # where all is gone no curve is asked for
        curve = there.alpha * (_over(_over(gone - finite, finite, 0.0), finite, -0.5) + 0.5)
        if noisy:
            curve = curve - there.alpha  # diffusers' sign of 1/2, which no other of the three has
        keep = keep_sigma * np.exp(-h) if noisy else keep_sigma
        noise = there.sigma * np.sqrt(np.maximum(-np.expm1(-2 * h), 0)) if noisy else np.zeros_like(h)
        value = there.alpha * gone
        return Step(keep, value, value / 2, slope, curve, noise)
    twice = 2 if noisy else 1
    grown = np.expm1(h)
    value = -twice * there.sigma * grown
    slope = -twice * there.sigma * (_over(grown, h, 1.0) - 1)
    curve = -twice * there.sigma * (_over(_over(grown - h, h, 0.0), h, 0.5) - 0.5)
    noise = there.sigma * np.sqrt(np.maximum(np.expm1(2 * h), 0)) if noisy else np.zeros_like(h)
    return Step(keep_alpha, value, value / 2, slope, curve, noise)


def check_final_level(algorithm_type: str, final_sigmas_type: str) -> None:
    """Only a solver in x0 can go down to no noise at all.

    Raises:
        RequestError: another is to, or `deis`, with which diffusers refuses the same.
    """
    if final_sigmas_type == "zero" and not algorithm_type.endswith("++"):
        raise RequestError(
            f"found algorithm_type {algorithm_type!r} and final_sigmas_type 'zero', where epsilon is not known; set "
            "final_sigmas_type to 'sigma_min', or algorithm_type to 'dpmsolver++'"
        )


def multistep_weights(step: Step, solver_type: str, h: Float64s, order: NDArray[np.int64]) -> Float64s:
    """The weights of what is remembered, newest first, [N, 3] (DPM-Solver++, algorithm 2 and appendix B).

    D2 is the divided difference, as the authors' code and diffusers have it; that is half the second derivative, where
    `curve` is made for the whole, so that with solver_order 3 the method is of order 2 (docs/samplers.md measures it).

    Args:
        step: of each row.
        solver_type: `midpoint` or `heun`, for order 2.
        h: the length of each row's step in λ, [N].
        order: of each row's step.

    Raises:
        RequestError: two steps are at the same noise level.
    """
    weights = np.zeros((len(h), 3))
    weights[:, 0] = step.value
    second, third = np.flatnonzero(order == 2), np.flatnonzero(order == 3)
    later = np.concatenate([second, third])
    check_levels_differ(differ=bool(np.all(h[later - 1] != 0) and np.all(h[third - 2] != 0)))
    slope = (step.half if solver_type == "midpoint" else step.slope)[second] * h[second] / h[second - 1]
    weights[second, 0] += slope
    weights[second, 1] -= slope

    h0, h1 = h[third - 1], h[third - 2]
    newer = (h[third] / h0)[:, np.newaxis] * np.array([1.0, -1.0, 0.0])  # D1 between the last two, on m0, m1, m2
    older = (h[third] / h1)[:, np.newaxis] * np.array([0.0, 1.0, -1.0])
    d1 = newer + (h0 / (h0 + h1))[:, np.newaxis] * (newer - older)
    d2 = (h[third] / (h0 + h1))[:, np.newaxis] * (newer - older)
    weights[third] += step.slope[third, np.newaxis] * d1 + step.curve[third, np.newaxis] * d2
    return weights


def _over(numerator: Float64s, denominator: Float64s, at_zero: float) -> Float64s:
    """numerator / denominator, and its limit where the denominator is 0."""
    limit = np.full_like(denominator, at_zero)
    return np.divide(numerator, denominator, out=limit, where=denominator != 0)

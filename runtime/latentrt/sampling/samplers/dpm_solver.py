"""The coefficients of one step of DPM-Solver (Lu et al. 2022, https://arxiv.org/abs/2206.00927, in ε) and DPM-Solver++
(https://arxiv.org/abs/2211.01095, in x0), for the probability flow and for the reverse SDE.

The reverse SDE forgets twice as fast: h counts twice, and noise is added.
"""

from __future__ import annotations

from math import factorial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.printable import quote
from latentrt.errors import RequestError
from latentrt.sampling.samplers.log_snr import NoiseGrid, check_distinct_sigmas

__all__ = ["Algorithm", "Step", "check_final_sigma", "multistep_weights", "solver_step"]

Float64s = NDArray[np.float64]
Algorithm = Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"]


class Step(NamedTuple):
    """x_t = x·x_s + d0·D0 + d1·D1 + d2·D2 + noise·z, each [N].

    D0 is x0 or ε at s; D1 and D2 are its first and second differences over λ, in units of the step.
    """

    x: Float64s
    d0: Float64s
    d1: Float64s
    d2: Float64s
    noise: Float64s

    @property
    def d1_midpoint(self) -> Float64s:
        """The coefficient of D1 in solvers of the midpoint type."""
        return self.d0 / 2


def solver_step(
    algorithm: Algorithm, after: NoiseGrid, h: Float64s, alpha_ratio: Float64s, sigma_ratio: Float64s
) -> Step:
    """Return the coefficients of a step from s to t.

    In x0, with h doubled in the exponentials of the SDE:
        (σ_t / σ_s) x_s + α_t (1 − e^−h) D0 + α_t (1 − (1 − e^−h) / h) D1 + α_t ((1 − e^−h − h) / h² + ½) D2
    In ε, with all but the first coefficient doubled for the SDE:
        (α_t / α_s) x_s − σ_t (e^h − 1) D0 − σ_t ((e^h − 1) / h − 1) D1 − σ_t ((e^h − 1 − h) / h² − ½) D2

    Args:
        algorithm: in x0 (`++`) or in ε, for the SDE (`sde-`) or the probability flow.
        after: the noise grid at t.
        h: λ_t − λ_s; may be infinite in x0. Where rounding makes it slightly negative, no noise is added.
        alpha_ratio, sigma_ratio: α_t / α_s and σ_t / σ_s.
    """
    sde, in_x0 = algorithm.startswith("sde"), algorithm.endswith("++")
    if in_x0:
        length = 2 * h if sde else h
        d2 = -after.alpha * _taylor_tail(-length, 2)
        if sde:
            d2 = d2 - after.alpha  # diffusers' sign of ½, which none of the other three has
        return Step(
            x=sigma_ratio * np.exp(-h) if sde else sigma_ratio,
            d0=-after.alpha * np.expm1(-length),
            d1=-after.alpha * _taylor_tail(-length, 1),
            d2=d2,
            noise=after.sigma * np.sqrt(np.maximum(-np.expm1(-2 * h), 0)) if sde else np.zeros_like(h),
        )
    scale = -2 * after.sigma if sde else -after.sigma
    return Step(
        x=alpha_ratio,
        d0=scale * np.expm1(h),
        d1=scale * _taylor_tail(h, 1),
        d2=scale * _taylor_tail(h, 2),
        noise=after.sigma * np.sqrt(np.maximum(np.expm1(2 * h), 0)) if sde else np.zeros_like(h),
    )


def check_final_sigma(algorithm_type: str, final_sigmas_type: str) -> None:
    """Check that the solver can step to σ = 0, which only solvers in x0 can.

    Raises:
        RequestError: it cannot; also for `deis`, as in diffusers.
    """
    if final_sigmas_type == "zero" and not algorithm_type.endswith("++"):
        raise RequestError(
            f"got `algorithm_type` {quote(algorithm_type)} with `final_sigmas_type` 'zero', where epsilon is "
            "undefined; set `final_sigmas_type` to 'sigma_min', or `algorithm_type` to 'dpmsolver++'"
        )


def multistep_weights(step: Step, solver_type: str, h: Float64s, order: NDArray[np.int64]) -> Float64s:
    """Return the weights of the history, newest first, [N, 3] (DPM-Solver++, algorithm 2 and appendix B).

    D2 is the divided difference, as in the authors' code and in diffusers. That is half the second derivative, but its
    coefficient is that of the whole, so with solver_order 3 the method is of order 2 (measured in docs/samplers.md).

    Args:
        step: the coefficients of each row.
        solver_type: `midpoint` or `heun`, for order 2.
        h: the length of each row's step in λ, [N].
        order: the order of each row's step, [N].

    Raises:
        RequestError: two steps have the same σ.
    """
    weights = np.zeros((len(h), 3))
    weights[:, 0] = step.d0
    second, third = np.flatnonzero(order == 2), np.flatnonzero(order == 3)
    later = np.concatenate([second, third])
    check_distinct_sigmas(distinct=bool(np.all(h[later - 1] != 0) and np.all(h[third - 2] != 0)))
    d1_weight = (step.d1_midpoint if solver_type == "midpoint" else step.d1)[second] * h[second] / h[second - 1]
    weights[second, 0] += d1_weight
    weights[second, 1] -= d1_weight

    h0, h1 = h[third - 1], h[third - 2]
    newer = (h[third] / h0)[:, np.newaxis] * np.array(
        [1.0, -1.0, 0.0]
    )  # D1_0, of the newest two values, as weights of the three
    older = (h[third] / h1)[:, np.newaxis] * np.array([0.0, 1.0, -1.0])
    d1 = newer + (h0 / (h0 + h1))[:, np.newaxis] * (newer - older)
    d2 = (h[third] / (h0 + h1))[:, np.newaxis] * (newer - older)
    weights[third] += step.d1[third, np.newaxis] * d1 + step.d2[third, np.newaxis] * d2
    return weights


def _taylor_tail(x: Float64s, order: Literal[1, 2]) -> Float64s:
    """Return (e^x − 1) / x − 1, or (e^x − 1 − x) / x² − ½, which are Σ xⁿ / (n + order)! over n ≥ 1; −∞ is allowed.

    The closed forms lose a digit for each power of ten of 1 / |x|^order, so that small x are summed.
    """
    n = np.arange(1, 18)  # the first term left out is below 1e-19 of the sum
    terms = np.where(np.abs(x) < 1, x, 0.0)[..., np.newaxis] ** n / [factorial(i + order) for i in n.tolist()]
    large = np.where(np.abs(x) < 1, 1.0, x)
    closed = np.expm1(large) / large - 1
    if order == 2:
        closed = closed / large - 0.5
    return np.where(np.abs(x) < 1, np.sum(terms[..., ::-1], axis=-1), closed)

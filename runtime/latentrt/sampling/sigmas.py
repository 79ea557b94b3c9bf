"""How noisy is the latent, when?

First the training noise schedule, which a checkpoint fixes: β → ᾱ → σ. It reproduces the constants that diffusers
rounds to float32, to the bit, except that every square root is rounded correctly (torch's own, where a σ or zero SNR
needs one, is a unit in the last place off here and there). Then the grids, the few times at which a sampler visits it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.sampling.beta_distribution import quantile

__all__ = [
    "RESPACED",
    "BetaSchedule",
    "Spacing",
    "alphas_cumprod",
    "at_timesteps",
    "beta",
    "betas",
    "check_ends",
    "dynamically_shifted",
    "exponential",
    "karras",
    "leading",
    "linspace",
    "linspace_float32",
    "rescale_zero_snr",
    "shifted",
    "sigmas",
    "stretched",
    "timesteps",
    "timesteps_of_sigmas",
    "trailing",
    "visited",
    "whole_timesteps",
]

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp", "laplace", "sigmoid"]
Spacing = Literal["leading", "linspace", "trailing"]

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]

MAX_BETA = 0.999  # the cap of squaredcos_cap_v2
ALMOST_ZERO = np.float32(2**-24)  # in place of ᾱ = 0 where σ = √((1 − ᾱ) / ᾱ) has to be finite; diffusers' choice


def linspace_float32(start: float, end: float, count: int) -> Float32s:
    """`torch.linspace` in float32: from both ends to the middle, each value rounded once (a fused multiply and add)."""
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    values = np.where(index < max(count // 2, 1), first + step * index, last - step * (count - 1 - index))
    return values.astype(np.float32)


def betas(schedule: BetaSchedule, start: float, end: float, count: int) -> Float32s:
    """The variance that training adds at each timestep, float32 [count].

    It grows linearly (Ho et al. 2020), or its square root does (Rombach et al. 2022), or as a sigmoid does (GeoDiff, Xu
    et al. 2022); or it is such that ᾱ falls as a squared cosine (Nichol and Dhariwal 2021, equation 17), as e⁻¹²ᵗ, or
    as Laplace noise would have it (Hang et al. 2024).
    """
    if schedule == "linear":
        return linspace_float32(start, end, count)
    if schedule == "scaled_linear":
        return linspace_float32(start**0.5, end**0.5, count) ** 2
    if schedule == "sigmoid":
        ramp = linspace_float32(-6, 6, count).astype(np.float64)
        risen: Float32s = (1 / (1 + np.exp(-ramp))).astype(np.float32) * (end - start) + start
        return risen
    alpha_bar = [_ALPHA_BAR[schedule](i / count) for i in range(count + 1)]
    return np.array([min(1 - alpha_bar[i + 1] / alpha_bar[i], MAX_BETA) for i in range(count)], np.float32)


def _laplace(t: float) -> float:
    half_log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    snr = math.exp(half_log_snr)
    return math.sqrt(snr / (1 + snr))


_ALPHA_BAR = {  # the fraction of training → ᾱ
    "squaredcos_cap_v2": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
    "exp": lambda t: math.exp(-12.0 * t),
    "laplace": _laplace,
}


def rescale_zero_snr(beta: Float32s) -> Float32s:
    """Betas rescaled so that the last timestep is pure noise (Lin et al. 2023, algorithm 1), float32."""
    root = np.sqrt(_cumulative_product(1 - beta))
    first, last = root[0], root[-1]
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    alpha = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alpha


def alphas_cumprod(beta: Sequence[float] | Float32s) -> Float32s:
    """ᾱ: how much of the picture's variance is left at each timestep, float32 like β.

    Raises:
        RequestError: some β makes ᾱ leave 0 ≤ ᾱ < 1.
    """
    alpha_bar = _cumulative_product(1 - np.asarray(beta, np.float32))
    if not np.all((alpha_bar >= 0) & (alpha_bar < 1)):
        raise RequestError(
            "found a training noise schedule that adds no noise or more than all, expected betas between 0 and 1; "
            "correct beta_start, beta_end or trained_betas in the scheduler's configuration"
        )
    return alpha_bar


def _cumulative_product(alpha: Float32s) -> Float32s:
    """`torch.cumprod` on a CPU: accumulated in float64, rounded to float32."""
    return np.cumprod(alpha, dtype=np.float64).astype(np.float32)


def sigmas(alpha_bar: Float32s) -> Float32s:
    """σ = √((1 − ᾱ) / ᾱ): the noise beside an unscaled picture (Karras et al. 2022), float32.

    Where ᾱ is 0, `ALMOST_ZERO` takes its place.
    """
    alpha_bar = np.where(alpha_bar > 0, alpha_bar, ALMOST_ZERO)
    level: Float32s = np.sqrt((1 - alpha_bar) / alpha_bar)
    return level


# Timestep grids: Lin et al. 2023, table 2. All descend, and are float64 with whole numbers where not said otherwise.


def timesteps(spacing: Spacing, count: int, num_train_timesteps: int, offset: int) -> Float64s:
    """The grid as DDIM, PNDM and the two Euler samplers have it.

    `offset` moves only the leading one; linspace is not rounded.
    """
    if spacing == "linspace":
        return linspace(count, num_train_timesteps)
    if spacing == "leading":
        return leading(count, num_train_timesteps) + offset
    return trailing(count, num_train_timesteps, num_train_timesteps)


def linspace(count: int, num_train_timesteps: int) -> Float64s:
    """`count` timesteps from the last one to 0, both included; fractions of timesteps."""
    return np.linspace(0, num_train_timesteps - 1, count)[::-1]


def leading(count: int, num_train_timesteps: int) -> Float64s:
    """0 and every ⌊T / count⌋-th timestep after it: the last of training is not among them."""
    _check_count(count, num_train_timesteps)
    return np.arange(count, dtype=np.float64)[::-1] * (num_train_timesteps // count)


def trailing(count: int, num_train_timesteps: int, start: int) -> Float64s:
    """`start` − 1 and every (T / count)-th timestep before it, and for some counts one that `visited` removes."""
    _check_count(count, num_train_timesteps)
    return np.round(np.arange(start, 0, -num_train_timesteps / count)) - 1


def visited(grid: Float64s) -> Float64s:
    """The timesteps of a grid that are timesteps.

    For some counts, the first of them 61, a rounding error makes `trailing` go on to −1. diffusers visits that too and
    reads off the constants of timestep −1, which in Python are those of the noisiest; here it is left out.
    """
    return grid[grid >= 0]


def _check_count(count: int, limit: int) -> None:
    if count > limit:
        raise RequestError(
            f"found {count} steps, but there are only {limit} timesteps to place them on; ask for at most that many"
        )


def whole_timesteps(spacing: Spacing, count: int, num_train_timesteps: int, offset: int) -> NDArray[np.int64]:
    """The grid as whole numbers, for the samplers that look constants up by timestep."""
    _check_count(count, num_train_timesteps)
    return visited(timesteps(spacing, count, num_train_timesteps, offset).round()).astype(np.int64)


def at_timesteps(alpha_bar: Float32s, t: NDArray[np.int64], final: float | np.float32) -> Float64s:
    """ᾱ at each timestep t, and `final` where t lies before the first one (t < 0); float64.

    Raises:
        RequestError: a timestep lies beyond training.
    """
    if t.max() >= len(alpha_bar):
        raise RequestError(
            f"found a step at timestep {t.max()}, but training has only 0 to {len(alpha_bar) - 1}; "
            "ask for fewer steps; or lower the configuration's steps_offset, or choose timestep_spacing 'trailing'"
        )
    return np.where(t >= 0, alpha_bar[np.maximum(t, 0)], np.float64(final))


def karras(sigma_max: float, sigma_min: float, count: int, rho: float = 7.0) -> Float64s:
    """Noise levels from high to low, float64 [count], denser where σ is small (Karras et al. 2022, equation 5)."""
    ramp = np.linspace(0, 1, count)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    levels: Float64s = (high + ramp * (low - high)) ** rho
    return levels


def exponential(sigma_max: float, sigma_min: float, count: int) -> Float64s:
    """Noise levels from high to low, float64 [count], each the same part of the one before."""
    levels: Float64s = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))
    return levels


def beta(sigma_max: float, sigma_min: float, count: int) -> Float64s:
    """Noise levels from high to low, float64 [count], denser at both ends (Lee et al. 2024, Beta Sampling)."""
    share = quantile(1 - np.linspace(0, 1, count), 0.6, 0.6)
    return sigma_min + share * (sigma_max - sigma_min)


def check_ends(low: float | None, high: float | None) -> None:
    """Levels that fall have ends that do.

    Raises:
        RequestError: they do not.
    """
    if low is not None and high is not None and not low < high:
        raise RequestError(f"found sigma_min {low:g} and sigma_max {high:g}, expected the first below the second")


RESPACED = {"karras": karras, "exponential": exponential, "beta": beta}


def shifted(levels: Float64s, shift: float) -> Float64s:
    """Levels of a flow moved towards noise, as pictures of more pixels want it (Esser et al. 2024, equation 23)."""
    moved: Float64s = shift * levels / (1 + (shift - 1) * levels)
    return moved


def dynamically_shifted(levels: Float64s, mu: float, kind: Literal["exponential", "linear"]) -> Float64s:
    """Levels of a flow shifted by e^mu, or by mu itself (`linear`)."""
    if kind == "linear" and not mu > 0:
        raise RequestError(
            f"found mu {mu:g} and time_shift_type 'linear', where mu is the shift itself; give one above 0"
        )
    shift = math.exp(mu) if kind == "exponential" else mu
    moved: Float64s = shift / (shift + (1 / levels - 1))
    return moved


def stretched(levels: Float64s, terminal: float) -> Float64s:
    """Levels of a flow stretched so that the last is `terminal` (LTX-Video, HaCohen et al. 2024).

    Raises:
        RequestError: the last is 1 already.
    """
    if levels[-1] == 1:
        raise RequestError(
            "found shift_terminal and a single step from pure noise, which cannot be stretched; ask for more steps"
        )
    away = 1 - levels
    reaching: Float64s = 1 - away / (away[-1] / (1 - terminal))
    return reaching


def timesteps_of_sigmas(levels: Float64s, training: Float32s) -> Float64s:
    """The fraction of a timestep at which training has each noise level, by interpolation of log σ.

    Beyond either end of training it is that end.

    Args:
        levels: float64 [N].
        training: the σ of every training timestep, float32 [T], ascending; at zero SNR the one before last may be
            above the last, which `ALMOST_ZERO` caps.
    """
    log_levels, log_training = np.log(np.maximum(levels, 1e-10)), np.log(training)
    low = np.clip(_last_up_to(log_training, log_levels), 0, len(training) - 2)
    below, above = log_training[low], log_training[low + 1]
    weight = np.clip((below - log_levels) / (below - above), 0, 1)
    t: Float64s = (1 - weight) * low + weight * (low + 1)
    return t


def _last_up_to(values: Float32s, limits: Float64s) -> NDArray[np.intp]:
    """The index of the last value that is not above each limit, −1 where there is none."""
    if np.all(values[1:] >= values[:-1]):
        return np.searchsorted(values, limits, side="right") - 1
    return np.array([np.flatnonzero(values <= limit).max(initial=-1) for limit in limits], np.intp)

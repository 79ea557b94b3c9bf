"""Noise schedules: β, ᾱ and σ of training, and the grids of timesteps and σ that a sampler visits.

The training noise schedule is fixed by the checkpoint: β → ᾱ → σ. Constants that diffusers rounds to float32 are
reproduced to the bit, except that every square root is rounded correctly (torch's own, used for σ and zero SNR, is a
unit in the last place off here and there).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError

__all__ = [
    "SIGMA_SPACINGS",
    "BetaSchedule",
    "TimestepSpacing",
    "alpha_bar_at",
    "alphas_cumprod",
    "beta_quantile",
    "beta_sigmas",
    "check_sigma_range",
    "drop_negative",
    "exponential_sigmas",
    "karras_sigmas",
    "leading_timesteps",
    "linspace_float32",
    "linspace_timesteps",
    "rescale_zero_snr",
    "shift_sigmas",
    "shift_sigmas_dynamically",
    "sigmas_to_timesteps",
    "space_timesteps",
    "space_whole_timesteps",
    "stretch_sigmas_to_terminal",
    "trailing_timesteps",
    "training_betas",
    "training_sigmas",
]

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp", "laplace", "sigmoid"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]

Float32s = NDArray[np.float32]
Float64s = NDArray[np.float64]

MAX_BETA = 0.999  # the cap of squaredcos_cap_v2
ALMOST_ZERO = np.float32(2**-24)  # replaces ᾱ = 0 where σ = √((1 − ᾱ) / ᾱ) has to be finite; diffusers' choice


# The noise schedule of training.


def linspace_float32(start: float, end: float, count: int) -> Float32s:
    """Return `torch.linspace` in float32, [count].

    torch computes from both ends to the middle and rounds each value once (a fused multiply and add).
    """
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    values = np.where(index < max(count // 2, 1), first + step * index, last - step * (count - 1 - index))
    return values.astype(np.float32)


def training_betas(schedule: BetaSchedule, start: float, end: float, count: int) -> Float32s:
    """Return β, the variance that training adds at each timestep, float32 [count].

    β grows linearly (Ho et al. 2020), or √β does (`scaled_linear`, Rombach et al. 2022), or β grows as a sigmoid
    (GeoDiff, Xu et al. 2022); or ᾱ falls as a squared cosine (Nichol and Dhariwal 2021, equation 17), as e^(−12·t)
    (`exp`), or with log-SNR distributed as Laplace (Hang et al. 2024).
    """
    if schedule == "linear":
        return linspace_float32(start, end, count)
    if schedule == "scaled_linear":
        return linspace_float32(start**0.5, end**0.5, count) ** 2
    if schedule == "sigmoid":
        ramp = linspace_float32(-6, 6, count).astype(np.float64)
        betas: Float32s = (1 / (1 + np.exp(-ramp))).astype(np.float32) * (end - start) + start
        return betas
    alpha_bar = [_ALPHA_BAR[schedule](i / count) for i in range(count + 1)]
    return np.array([min(1 - alpha_bar[i + 1] / alpha_bar[i], MAX_BETA) for i in range(count)], np.float32)


def _laplace_alpha_bar(t: float) -> float:
    half_log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    snr = math.exp(half_log_snr)
    return math.sqrt(snr / (1 + snr))


_ALPHA_BAR = {  # fraction of training → ᾱ
    "squaredcos_cap_v2": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
    "exp": lambda t: math.exp(-12.0 * t),
    "laplace": _laplace_alpha_bar,
}


def rescale_zero_snr(betas: Float32s) -> Float32s:
    """Rescale β so that the last timestep is pure noise (Lin et al. 2023, algorithm 1), float32."""
    root = np.sqrt(_cumulative_product(1 - betas))
    first, last = root[0], root[-1]
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    alpha = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alpha


def alphas_cumprod(betas: Sequence[float] | Float32s) -> Float32s:
    """Return ᾱ, the share of the image's variance that is left at each timestep, float32 like β.

    Raises:
        RequestError: some ᾱ is outside 0 ≤ ᾱ < 1.
    """
    alpha_bar = _cumulative_product(1 - np.asarray(betas, np.float32))
    if not np.all((alpha_bar >= 0) & (alpha_bar < 1)):
        raise RequestError(
            "the training noise schedule has betas outside 0 … 1; correct `beta_start`, `beta_end` or `trained_betas`"
        )
    return alpha_bar


def _cumulative_product(alpha: Float32s) -> Float32s:
    """Return `torch.cumprod` on a CPU: accumulated in float64, rounded to float32."""
    return np.cumprod(alpha, dtype=np.float64).astype(np.float32)


def training_sigmas(alpha_bar: Float32s) -> Float32s:
    """Return σ = √((1 − ᾱ) / ᾱ), the noise per signal (Karras et al. 2022), float32.

    ᾱ = 0 is replaced by `ALMOST_ZERO`.
    """
    alpha_bar = np.where(alpha_bar > 0, alpha_bar, ALMOST_ZERO)
    sigmas: Float32s = np.sqrt((1 - alpha_bar) / alpha_bar)
    return sigmas


def alpha_bar_at(alpha_bar: Float32s, t: NDArray[np.int64], final: float | np.float32) -> Float64s:
    """Return ᾱ at each timestep t, and `final` at timesteps before the first one (t < 0); float64.

    Raises:
        RequestError: a timestep is beyond training.
    """
    if t.max() >= len(alpha_bar):
        raise RequestError(
            f"a step is at timestep {t.max()}, but training has only 0 to {len(alpha_bar) - 1}; reduce "
            "`num_inference_steps` or `steps_offset`, or set `timestep_spacing` to 'trailing'"
        )
    return np.where(t >= 0, alpha_bar[np.maximum(t, 0)], np.float64(final))


# Grids of timesteps (Lin et al. 2023, table 2). All descend; they are float64 holding whole numbers unless said
# otherwise.


def space_timesteps(spacing: TimestepSpacing, count: int, num_train_timesteps: int, offset: int) -> Float64s:
    """Return the timestep grid of DDIM, PNDM and the Euler samplers, [count].

    `offset` moves only the leading grid; the linspace grid is not rounded.
    """
    if spacing == "linspace":
        return linspace_timesteps(count, num_train_timesteps)
    if spacing == "leading":
        return leading_timesteps(count, num_train_timesteps) + offset
    return trailing_timesteps(count, num_train_timesteps, num_train_timesteps)


def linspace_timesteps(count: int, num_train_timesteps: int) -> Float64s:
    """Return `count` timesteps from the last one to 0, both included; fractions of timesteps."""
    return np.linspace(0, num_train_timesteps - 1, count)[::-1]


def leading_timesteps(count: int, num_train_timesteps: int) -> Float64s:
    """Return 0 and every ⌊T / count⌋-th timestep after it; the last timestep of training is not among them."""
    _check_count(count, num_train_timesteps)
    return np.arange(count, dtype=np.float64)[::-1] * (num_train_timesteps // count)


def trailing_timesteps(count: int, num_train_timesteps: int, start: int) -> Float64s:
    """Return `start` − 1 and every (T / count)-th timestep before it; for some counts −1 too (see `drop_negative`)."""
    _check_count(count, num_train_timesteps)
    return np.round(np.arange(start, 0, -num_train_timesteps / count)) - 1


def drop_negative(t: Float64s) -> Float64s:
    """Remove timestep −1 from a grid.

    For some counts, the first of them 61, a rounding error makes `trailing_timesteps` go on to −1. diffusers visits it
    and reads the constants at index −1, which in Python are those of the noisiest timestep.
    """
    return t[t >= 0]


def _check_count(count: int, limit: int) -> None:
    if count > limit:
        raise RequestError(f"got {count} steps (`num_inference_steps`), expected at most {limit}, one per timestep")


def space_whole_timesteps(
    spacing: TimestepSpacing, count: int, num_train_timesteps: int, offset: int
) -> NDArray[np.int64]:
    """Return the timestep grid in whole numbers, for samplers that look constants up by timestep."""
    _check_count(count, num_train_timesteps)
    t = space_timesteps(spacing, count, num_train_timesteps, offset).round()
    return drop_negative(t).astype(np.int64)


# Grids of σ.


def karras_sigmas(sigma_max: float, sigma_min: float, count: int, rho: float = 7.0) -> Float64s:
    """Return descending σ, float64 [count], denser where σ is small (Karras et al. 2022, equation 5)."""
    ramp = np.linspace(0, 1, count)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas: Float64s = (high + ramp * (low - high)) ** rho
    return sigmas


def exponential_sigmas(sigma_max: float, sigma_min: float, count: int) -> Float64s:
    """Return descending σ, float64 [count], evenly spaced in log σ."""
    sigmas: Float64s = np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), count))
    return sigmas


def beta_sigmas(sigma_max: float, sigma_min: float, count: int) -> Float64s:
    """Return descending σ, float64 [count], denser at both ends (Beta Sampling, Lee et al. 2024)."""
    share = beta_quantile(1 - np.linspace(0, 1, count), 0.6, 0.6)
    return sigma_min + share * (sigma_max - sigma_min)


SIGMA_SPACINGS = {"karras": karras_sigmas, "exponential": exponential_sigmas, "beta": beta_sigmas}


def check_sigma_range(sigma_min: float | None, sigma_max: float | None) -> None:
    """Check that σ can descend from `sigma_max` to `sigma_min`.

    Raises:
        RequestError: `sigma_min` is not below `sigma_max`.
    """
    if sigma_min is not None and sigma_max is not None and not sigma_min < sigma_max:
        raise RequestError(f"got `sigma_min`={sigma_min:g} and `sigma_max`={sigma_max:g}; expected the first below")


def shift_sigmas(sigmas: Float64s, shift: float) -> Float64s:
    """Move σ of a flow towards noise, as larger images need (Esser et al. 2024, equation 23)."""
    shifted: Float64s = shift * sigmas / (1 + (shift - 1) * sigmas)
    return shifted


def shift_sigmas_dynamically(sigmas: Float64s, mu: float, kind: Literal["exponential", "linear"]) -> Float64s:
    """Shift σ of a flow by e^mu (`exponential`) or by mu itself (`linear`), as diffusers' `time_shift`."""
    if kind == "linear" and not mu > 0:
        raise RequestError(f"`mu`: got {mu:g} with `time_shift_type` 'linear', where it is the shift; expected above 0")
    shift = math.exp(mu) if kind == "exponential" else mu
    shifted: Float64s = shift / (shift + (1 / sigmas - 1))
    return shifted


def stretch_sigmas_to_terminal(sigmas: Float64s, terminal: float) -> Float64s:
    """Stretch σ of a flow so that the last is `terminal` (LTX-Video, HaCohen et al. 2024).

    Raises:
        RequestError: the last σ is 1.
    """
    if sigmas[-1] == 1:
        raise RequestError(
            "got `shift_terminal` with a single step from pure noise, which cannot be stretched; increase "
            "`num_inference_steps`"
        )
    signal = 1 - sigmas
    stretched: Float64s = 1 - signal / (signal[-1] / (1 - terminal))
    return stretched


def sigmas_to_timesteps(sigmas: Float64s, training: Float32s) -> Float64s:
    """Return the fractional timestep at which training has each σ, interpolated in log σ and clipped to training.

    Args:
        sigmas: float64 [N].
        training: σ of every training timestep, float32 [T], ascending; at zero SNR the second to last may exceed the
            last, which `ALMOST_ZERO` caps.
    """
    c_noises, log_training = np.log(np.maximum(sigmas, 1e-10)), np.log(training)
    low = np.clip(_last_up_to(log_training, c_noises), 0, len(training) - 2)
    below, above = log_training[low], log_training[low + 1]
    weight = np.clip((below - c_noises) / (below - above), 0, 1)
    t: Float64s = (1 - weight) * low + weight * (low + 1)
    return t


def _last_up_to(values: Float32s, limits: Float64s) -> NDArray[np.intp]:
    """Return the index of the last value that does not exceed each limit, −1 where all do."""
    if np.all(values[1:] >= values[:-1]):
        return np.searchsorted(values, limits, side="right") - 1
    return np.array([np.flatnonzero(values <= limit).max(initial=-1) for limit in limits], np.intp)


# The quantile function of the beta distribution. The regularised incomplete beta function is its power series
# (Abramowitz and Stegun 26.5.23), which on [0, 1/2] gains a binary digit with every term; the other half of the
# interval is its mirror image. The inverse is Newton's.

_SERIES_TERMS = 64  # 2⁻⁶⁴ is below the last place of float64
_NEWTON_ITERATIONS = 60


def beta_quantile(probability: Float64s, alpha: float, beta: float) -> Float64s:
    """Return the quantiles of a beta distribution, float64 in 0 … 1.

    Args:
        probability: 0 … 1, of any shape.
        alpha, beta: the distribution's parameters, above 0 and at most 1.
    """
    middle = _beta_cdf(np.array(0.5), alpha, beta)
    left = probability <= middle
    return np.where(
        left,
        _beta_left_quantile(np.where(left, probability, 0), alpha, beta),
        1 - _beta_left_quantile(np.where(left, 0, 1 - probability), beta, alpha),
    )


def _beta_left_quantile(probability: Float64s, alpha: float, beta: float) -> Float64s:
    """Return quantiles that are at most 1/2."""
    # Start from the density near 0, x^(α−1) / B: from there Newton's method descends without overshooting.
    x = np.minimum((probability * alpha * _beta_function(alpha, beta)) ** (1 / alpha), 0.5)
    for _ in range(_NEWTON_ITERATIONS):
        positive = np.where(x > 0, x, 0.5)
        density = positive ** (alpha - 1) * (1 - positive) ** (beta - 1) / _beta_function(alpha, beta)
        step = np.where(x > 0, (_beta_cdf(positive, alpha, beta) - probability) / density, 0)
        x = np.clip(x - step, x / 8, 0.5)
        if np.all(np.abs(step) <= np.spacing(x)):
            break
    return x


def _beta_cdf(x: Float64s, alpha: float, beta: float) -> Float64s:
    """Return the probability below x, for 0 ≤ x ≤ 1/2."""
    total, term = np.zeros_like(x), np.ones_like(x)
    for n in range(_SERIES_TERMS):
        total = total + term / (alpha + n)
        term = term * x * (n + 1 - beta) / (n + 1)
    below: Float64s = x**alpha * total / _beta_function(alpha, beta)
    return below


def _beta_function(alpha: float, beta: float) -> float:
    return math.gamma(alpha) * math.gamma(beta) / math.gamma(alpha + beta)

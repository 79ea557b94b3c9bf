"""The schedule of a sampler, a table of coefficients, and the recurrence that runs it.

Every sampler of the field is a linear recurrence with a short memory, so it is a table with one row of coefficients per
model evaluation. With x_k the latents, m the (guided) model output and z standard normal noise, row k computes

    denoiser input  = c_in · x_k                       at timestep t
    y_k             = clip(p · x_k + q · m, ±limit)     x0 or epsilon, whichever makes the memory short
    h_k             = u · x_k + w · y_k                 the history of a multistep solver
    x_{k+1}         = a · x_k + e · x_{k−1} + d · m + Σ_j b[j] · h_{k−j} + s · z      j = 0 … memory − 1

Dynamic thresholding (Saharia et al. 2022, section 2.3) is the only nonlinear operation that differs between samples:
where `quantile` is not 0, the limit of a sample is that quantile of its own |y|, at least 1 and at most `limit`, and y
is divided by it.

A sample has the three axes [channels, height, width]; latents may have any number of axes before them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, fields, replace
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from latentrt.errors import RequestError

__all__ = ["COEFFICIENTS", "Latents", "Recurrence", "Schedule", "denoise"]

Latents = NDArray[np.float32]  # [..., channels, height, width]
Column = NDArray[np.float64] | float

COEFFICIENTS = ("c_in", "p", "q", "limit", "quantile", "u", "w", "a", "e", "d", "b", "s")


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The table of a sampler: N rows, one for each model evaluation.

    Coefficients are float64, to be cast once; arrays are read-only.

    Attributes:
        t: float32 [N], the time input of the model: the timestep, or that of `with_c_noise`.
        c_in, p, q, limit, u, w, a, e, d, s: [N], as in the formulas above. `limit` is infinite where nothing is
            clipped.
        quantile: [N], of dynamic thresholding; 0 in rows without it.
        b: [N, memory], the weights of h_k, h_{k−1}, … .
        noise_draws: int64 [N], the number of noise arrays that a row consumes. It may exceed what the row uses, so that
            seeds agree.
        alpha, sigma: [N], the noise level of x_k: clean latents x0 enter row k as alpha · x0 + sigma · z.
        init_noise_sigma: the factor that turns standard normal noise into x_0.
    """

    t: NDArray[np.float32]
    c_in: NDArray[np.float64]
    p: NDArray[np.float64]
    q: NDArray[np.float64]
    limit: NDArray[np.float64]
    quantile: NDArray[np.float64]
    u: NDArray[np.float64]
    w: NDArray[np.float64]
    a: NDArray[np.float64]
    e: NDArray[np.float64]
    d: NDArray[np.float64]
    b: NDArray[np.float64]
    s: NDArray[np.float64]
    noise_draws: NDArray[np.int64]
    alpha: NDArray[np.float64]
    sigma: NDArray[np.float64]
    init_noise_sigma: float

    def __post_init__(self) -> None:
        if not len(self.t) or not np.isfinite(self.init_noise_sigma):
            raise ValueError(
                f"schedule has {len(self.t)} rows and init_noise_sigma={self.init_noise_sigma}; expected at least one "
                "row and a finite value"
            )
        for name in (field.name for field in fields(self) if field.name != "init_noise_sigma"):
            column = getattr(self, name)
            rank, shape = 2 if name == "b" else 1, np.shape(column)
            if not isinstance(column, np.ndarray) or len(shape) != rank or len(column) != len(self.t):
                raise ValueError(
                    f"column {name} is a {type(column).__name__} of shape {shape}; expected an array of "
                    f"{len(self.t)} rows and {rank} axes"
                )
            with np.errstate(over="ignore"):
                finite = np.isfinite(column.astype(np.float32))  # the loop runs in float32
            if name != "limit" and not np.all(finite):
                raise ValueError(f"column {name} holds {column[~finite][0]}; expected finite float32 numbers")
            column.setflags(write=False)

    @classmethod
    def of(
        cls,
        *,
        t: NDArray[np.generic],
        a: Column,
        b: NDArray[np.float64],
        alpha: Column,
        sigma: Column,
        p: Column,
        q: Column,
        c_in: Column = 1.0,
        limit: Column = np.inf,
        quantile: Column = 0.0,
        u: Column = 0.0,
        w: Column = 1.0,
        e: Column = 0.0,
        d: Column = 0.0,
        s: Column = 0.0,
        noise_draws: NDArray[np.integer[Any]] | int = 0,
        init_noise_sigma: float = 1.0,
    ) -> Schedule:
        """Build a schedule from its columns.

        Args: as the attributes of the class; a number fills its whole column, and the default of an optional column
            leaves its term out.

        Raises:
            ValueError: a column has another length, or a value is not a finite float32 number.
        """

        def column(value: Column) -> NDArray[np.float64]:
            return np.array(np.broadcast_to(value, t.shape), np.float64)

        table = cls(
            t=t.astype(np.float32),
            c_in=column(c_in),
            p=column(p),
            q=column(q),
            limit=column(limit),
            quantile=column(quantile),
            u=column(u),
            w=column(w),
            a=column(a),
            e=column(e),
            d=column(d),
            b=b.astype(np.float64),
            s=column(s),
            noise_draws=np.array(np.broadcast_to(noise_draws, t.shape), np.int64),
            alpha=column(alpha),
            sigma=column(sigma),
            init_noise_sigma=float(init_noise_sigma),
        )
        return table._without_cancellation()

    def _without_cancellation(self) -> Schedule:
        """Rewrite the rows in which a·x nearly cancels against the part of b[0]·h_k that is a multiple of x.

        These are rows where x is nearly pure noise, and float32 would lose digits in the difference. They are
        rewritten in terms of x and m alone, which is impossible where y is limited.
        """
        newest = self.b[:, 0]
        a = self.a + newest * (self.u + self.w * self.p)
        cancels = ~np.isfinite(self.limit) & (np.abs(a) < np.abs(self.a) / 8)
        if not np.any(cancels):
            return self
        b = self.b.copy()
        b[cancels, 0] = 0.0
        d = np.where(cancels, self.d + newest * self.w * self.q, self.d)
        return replace(self, a=np.where(cancels, a, self.a), d=d, b=b)

    def __len__(self) -> int:
        return len(self.t)

    def looks_back_beyond(self, row: int) -> bool:
        """Return whether `row` or a later one uses latents or history of the rows before `row`."""
        age = np.arange(len(self) - row)[:, np.newaxis]  # how many earlier rows since `row` each row can look back to
        return bool(self.e[row] != 0 or np.any(self.b[row:][np.arange(self.memory) > age] != 0))

    def first_latents(self, noise: Latents, clean: Latents | None = None, *, row: int = 0) -> Latents:
        """Return the latents to start a row with.

        Args:
            noise: standard normal, float32, of any shape.
            clean: the latents of an image to start from, of the same shape; None starts from noise alone.
            row: the first row to run. A schedule built with `Steps.begin` starts at its own row 0.

        Raises:
            ValueError: `row` is not 0 and `clean` is None.
        """
        if clean is None:
            if row:
                raise ValueError(f"got row={row} without clean latents; expected row 0, or latents to start from")
            return noise * np.float32(self.init_noise_sigma)
        return np.float32(self.alpha[row]) * clean + np.float32(self.sigma[row]) * noise

    def with_c_noise(self) -> Schedule:
        """Return the schedule for a model that takes c_noise = ln(σ) / 4 in place of the timestep.

        σ is that of latents x0 + σ · ε (Karras et al. 2022, table 1).

        Raises:
            RequestError: a row has no noise, or nothing but noise.
        """
        if not (np.all(self.sigma) and np.all(self.alpha)):
            raise RequestError(
                "got a schedule with rows of pure noise (`rescale_betas_zero_snr`) or without noise, expected both in "
                "every row, as this model takes ln σ in place of the timestep; choose another sampler, or leave its "
                "options out"
            )
        return replace(self, t=(np.log(self.sigma / self.alpha) / 4).astype(np.float32))

    def starting_at(self, row: int) -> Schedule:
        """Return the schedule without its first `row` rows; the rest must not look back beyond `row`."""
        return self._select(slice(row, None))

    def ending_at(self, row: int) -> Schedule:
        """Return the first `row` rows of the schedule, whose last latents still have noise."""
        return self._select(slice(row))

    def _select(self, rows: slice) -> Schedule:
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "init_noise_sigma"}
        return replace(self, **{name: column[rows] for name, column in columns.items()})

    @property
    def memory(self) -> int:
        """Number of h values that a row may use, including its own."""
        return int(self.b.shape[1])


class Recurrence:
    """A run of a schedule: its coefficients, the latents before the last row, and the last `memory` values of h.

    Rows are run in order, from any row that the schedule does not look back beyond. A zero coefficient skips its array,
    which may then be missing or not finite.

    Args:
        schedule: the table to run.
        dtype: the precision of the arithmetic, float32 or float64; latents, model outputs and noise have the same one.
    """

    def __init__(self, schedule: Schedule, dtype: DTypeLike = np.float32) -> None:
        self._columns = {name: getattr(schedule, name).astype(dtype) for name in COEFFICIENTS}
        self._previous: Latents | None = None
        self._history: deque[Latents] = deque(maxlen=schedule.memory)  # newest first

    def model_input(self, k: int, x: Latents) -> Latents:
        """Return c_in · x_k, the input of the denoiser, of the shape of `x`."""
        return _combine(x, [(self._columns["c_in"][k], x)])

    def step(self, k: int, x: Latents, m: Latents, z: Latents | None = None) -> Latents:
        """Run row k and return x_{k+1}, a new array.

        Args:
            k: the row.
            x: x_k, float32 [..., channels, height, width].
            m: the model output for `model_input(k, x)` at timestep t[k], of the same shape.
            z: standard normal noise of the same shape; only a row with s ≠ 0 needs it.

        Raises:
            ValueError: the row uses noise, the previous latents or history that was not provided.
        """
        row = {name: column[k] for name, column in self._columns.items()}
        y = _limit(_combine(x, [(row["p"], x), (row["q"], m)]), row["limit"], row["quantile"])
        self._history.appendleft(_combine(x, [(row["u"], x), (row["w"], y)]))
        past = zip_longest(row["b"], self._history)
        x_next = _combine(x, [(row["a"], x), (row["e"], self._previous), (row["d"], m), *past, (row["s"], z)])
        self._previous = x
        return x_next


def _combine(like: Latents, terms: Iterable[tuple[Any, Latents | None]]) -> Latents:
    """Return Σ coefficient · array as a new array, without touching arrays whose coefficient is 0."""
    total = np.zeros_like(like)
    for coefficient, array in terms:
        if not np.any(coefficient):
            continue
        if array is None:
            raise ValueError("row uses noise, the previous latent or history that was not provided")
        total += coefficient * array
    return total


def _limit(y: Latents, limit: np.floating[Any], quantile: np.floating[Any]) -> Latents:
    """Clip y to ±limit; with a quantile, clip each sample to its own limit and divide by it."""
    if not np.isfinite(limit):
        return y
    if not quantile:
        return np.clip(y, -limit, limit)
    bound = np.minimum(np.maximum(_quantiles(np.abs(y), quantile), 1), limit).astype(y.dtype)
    thresholded: Latents = np.clip(y, -bound, bound) / bound
    return thresholded


def _quantiles(size: Latents, quantile: np.floating[Any]) -> Latents:
    """Return a quantile of each sample, [..., 1, 1, 1], interpolated between two values as in `torch.quantile`."""
    samples = size.reshape(*size.shape[:-3], -1)
    values = np.sort(samples, axis=-1)
    rank = np.float32(quantile) * np.float32(values.shape[-1] - 1)
    below = int(rank)
    low, high = (values[..., min(index, values.shape[-1] - 1)] for index in (below, below + 1))
    between: Latents = low + values.dtype.type(rank - np.float32(below)) * (high - low)
    return between[..., np.newaxis, np.newaxis, np.newaxis]


def denoise(
    schedule: Schedule,
    latents: Latents,
    model: Callable[[np.float32, Latents], Latents],
    noise: Callable[[], Latents],
) -> Generator[Latents, Latents | None, None]:
    """Run a schedule and yield the latents after each row. Latents that are sent back replace them.

    Args:
        schedule: the table.
        latents: x_0, that is `init_noise_sigma` times standard normal noise; float32 [..., channels, height, width].
        model: timestep and denoiser input → (guided) model output.
        noise: returns the next standard normal noise, of the latents' shape.
    """
    recurrence = Recurrence(schedule)
    for k, t in enumerate(schedule.t):
        output = model(t, recurrence.model_input(k, latents))
        z = None
        for _ in range(schedule.noise_draws[k]):
            z = noise()
        latents = recurrence.step(k, latents, output, z)
        changed = yield latents
        latents = latents if changed is None else changed

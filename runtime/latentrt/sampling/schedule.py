"""What does a sampler do at each step?

Every sampler of the field is a linear recurrence with a short memory, so it is a table: one row of coefficients per
model evaluation. A `Schedule` is that table and `Recurrence` is the one loop body that runs every table. With x_k the
latent, m the (guided) model output and z standard normal noise, row k says

    denoiser input  = c_in · x_k                       at timestep t
    y_k             = clip(p · x_k + q · m, ±limit)     x0 or epsilon, whichever makes the memory short
    h_k             = u · x_k + w · y_k                 what is remembered
    x_{k+1}         = a · x_k + e · x_{k−1} + d · m + Σ_j b[j] · h_{k−j} + s · z      j = 0 … memory − 1

Dynamic thresholding (Saharia et al. 2022, section 2.3) is the one thing that is not linear and differs from sample to
sample: where `quantile` is not 0, a sample's limit is that quantile of its own |y|, but at least 1 and at most `limit`,
and y is divided by it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.row import COEFFICIENTS, Latents, advanced, remembered, scaled

__all__ = ["Latents", "Recurrence", "Schedule", "denoise"]

Column = NDArray[np.float64] | float


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The table of a sampler: N rows, one for each model evaluation.

    Coefficients are float64, to be cast once; arrays are read-only.

    Attributes:
        t: float32 [N], the timestep that the model is told.
        c_in, p, q, limit, u, w, a, e, d, s: [N], as in the formulas above. `limit` is infinite where nothing is
            clipped.
        quantile: [N], of dynamic thresholding; 0 where there is none.
        b: [N, memory], the weights of h_k, h_{k−1}, … .
        noise_draws: int64 [N], how many z are drawn for a row. It may exceed what the row uses, so that seeds agree.
        alpha, sigma: [N], where a clean latent x0 stands before row k: alpha · x0 + sigma · z.
        init_noise_sigma: what multiplies standard normal noise to make x_0.
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
                f"found {len(self.t)} rows and init_noise_sigma {self.init_noise_sigma}, expected some, finite"
            )
        for name in (field.name for field in fields(self) if field.name != "init_noise_sigma"):
            column = getattr(self, name)
            rank = 2 if name == "b" else 1
            if column.ndim != rank or len(column) != len(self.t):
                raise ValueError(
                    f"column {name}: found shape {column.shape}, expected {len(self.t)} rows and {rank} axes"
                )
            with np.errstate(over="ignore"):
                finite = np.isfinite(column.astype(np.float32))  # as the loop has it
            if name != "limit" and not np.all(finite):
                raise ValueError(f"column {name}: found {column[~finite][0]}, expected finite float32 numbers")
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
        """A table from its columns. A number stands for itself in every row; what is left out does nothing."""

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
        """The same table, in which float32 loses nothing where a·x and what h_k has of x all but cancel.

        There (where x is nearly pure noise) the row takes x and m as they are. That cannot be done where y is limited.
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
        """Whether this row or a later one uses what was there before it: an earlier latent, or what was remembered."""
        age = np.arange(len(self) - row)[:, np.newaxis]  # how many rows are remembered, but for each row's own
        return bool(self.e[row] != 0 or np.any(self.b[row:][np.arange(self.memory) > age] != 0))

    def first_latents(self, noise: Latents, clean: Latents | None = None, *, row: int = 0) -> Latents:
        """The latents that a row begins with.

        Args:
            noise: standard normal, float32, of any shape.
            clean: the latents of a picture to begin from; None begins from noise alone, at the first row.
            row: where it begins. A table made with `Steps.begin` begins at its own first row.

        Raises:
            ValueError: a later row is to begin from noise alone.
        """
        if clean is None:
            if row:
                raise ValueError(
                    f"found row {row} and no clean latents, expected the first row, or latents to begin from"
                )
            return noise * np.float32(self.init_noise_sigma)
        return np.float32(self.alpha[row]) * clean + np.float32(self.sigma[row]) * noise

    def starting_at(self, row: int) -> Schedule:
        """The table without its first rows, of which those that stay must not remember anything."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = {name: column if name == "init_noise_sigma" else column[row:] for name, column in columns.items()}
        return Schedule(**kept)

    @property
    def memory(self) -> int:
        """How many of the last h a row may use, the newest included."""
        return int(self.b.shape[1])


class Recurrence:
    """A table being run: the coefficients in float32, the latent of the row before, and the last `memory` of h.

    Rows are taken in order, from any row whose predecessors the table does not look back to. Where each sample of a
    batch follows a table of its own, `latentrt.sampling.mixed_batch` does the same.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._columns = {name: getattr(schedule, name).astype(np.float32) for name in COEFFICIENTS}
        self._previous: Latents | None = None
        self._history: deque[Latents] = deque(maxlen=schedule.memory)  # newest first

    def model_input(self, k: int, x: Latents) -> Latents:
        """What the denoiser is shown of the latent x_k."""
        return scaled(self._columns["c_in"][k], x)

    def step(self, k: int, x: Latents, m: Latents, z: Latents | None = None) -> Latents:
        """Row k: from x_k to x_{k+1}.

        Args:
            k: the row.
            x: x_k, float32 [batch, channels, height, width].
            m: the model's output for `scale(k, x)` at timestep t[k], of the same shape.
            z: standard normal noise of the same shape; only a row with s ≠ 0 needs it.

        Raises:
            ValueError: the row looks back further than this run does, or needs noise and got none.
        """
        row = {name: column[k] for name, column in self._columns.items()}
        self._history.appendleft(remembered(row, x, m))
        x_next = advanced(row, x, m, self._previous, self._history, z)
        self._previous = x
        return x_next


def denoise(
    schedule: Schedule,
    latents: Latents,
    model: Callable[[np.float32, Latents], Latents],
    noise: Callable[[], Latents],
) -> Generator[Latents, Latents | None, None]:
    """Run a table, yielding the latents after each row. Latents that are sent back are those it goes on with.

    Args:
        schedule: the table.
        latents: x_0, that is `init_noise_sigma` times standard normal noise; float32 [batch, channels, height, width].
        model: timestep and denoiser input → (guided) model output.
        noise: the next draw of standard normal noise in the latents' shape.
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

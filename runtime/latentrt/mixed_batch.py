"""How are samples of different samplers, lengths and positions drawn in one batch?

A row is all that a sampler has to say of a step, so each sample of a batch can be at a row of its own. A server adds
requests as they come and takes pictures as they are done, while the denoiser is asked once for all that are under way:

    batch = MixedBatch()
    batch.add(schedule, latents, noise=draw)
    while batch.samples:
        timesteps, shown = batch.show()
        for sample in batch.step(model(timesteps, shown)):
            ...                                     # sample.latents are done

Each sample gets exactly what it would get alone, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.row import COEFFICIENTS, Latents, advanced, remembered, scaled
from latentrt.schedule import Schedule

__all__ = ["MixedBatch", "Sample"]


@dataclass(eq=False)
class Sample:
    """One sample under way.

    Attributes:
        schedule: its table.
        row: the next one to be done; as many as there are when it is done.
        latents: before that row, float32 [channels, height, width].
        noise: its next draw of standard normal noise, of the same shape; None for a table that draws none.
    """

    schedule: Schedule = field(repr=False)
    row: int
    latents: Latents = field(repr=False)
    noise: Callable[[], Latents] | None = field(default=None, repr=False)
    _previous: Latents | None = field(default=None, repr=False)
    _history: list[Latents] = field(default_factory=list, repr=False)  # newest first

    @property
    def done(self) -> bool:
        """Whether its table is at an end."""
        return self.row == len(self.schedule)


class MixedBatch:
    """Samples that are denoised together, each by its own table and from its own row.

    Attributes:
        samples: those under way, in the order in which `show` shows them.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []

    def add(
        self,
        schedule: Schedule,
        latents: Latents,
        *,
        row: int = 0,
        noise: Callable[[], Latents] | None = None,
    ) -> Sample:
        """Let a sample join.

        Args:
            schedule: its table.
            latents: before `row` (`Schedule.first_latents`), float32 [channels, height, width], of the others' shape.
            row: where it begins; no row from there on may look back beyond it.
            noise: its next draw of standard normal noise, of the latents' shape.

        Raises:
            ValueError: the latents have another shape, the row is none of the table's, or noise is drawn and there is
                none.
        """
        wanted = self.samples[0].latents.shape if self.samples else "(channels, height, width)"
        shape = wanted if self.samples else latents.shape
        if latents.dtype != np.float32 or latents.ndim != 3 or latents.shape != shape:
            raise ValueError(f"latents: found {latents.dtype} {latents.shape}, expected float32 {wanted}")
        if not 0 <= row < len(schedule):
            raise ValueError(f"found row {row} of a table of {len(schedule)}, expected 0 to {len(schedule) - 1}")
        if noise is None and np.any(schedule.noise_draws[row:]):
            raise ValueError("found no noise for a table that draws some, expected a function that gives the next draw")
        sample = Sample(schedule, row, latents, noise)
        self.samples.append(sample)
        return sample

    def show(self) -> tuple[NDArray[np.float32], Latents]:
        """What the denoiser is to be asked: timesteps [batch] and its input [batch, channels, height, width].

        Raises:
            ValueError: no sample is under way.
        """
        if not self.samples:
            raise ValueError("found no samples under way, expected some; add one")
        timesteps = np.array([sample.schedule.t[sample.row] for sample in self.samples], np.float32)
        return timesteps, scaled(self._column("c_in"), self._stacked([sample.latents for sample in self.samples]))

    def step(self, outputs: Latents) -> list[Sample]:
        """Do each sample's row, and let those go that are done.

        Args:
            outputs: the model's for what `show` gave, float32 [batch, channels, height, width].

        Returns:
            The samples whose tables are at an end.

        Raises:
            ValueError: the outputs have another shape, or a row looks back to before its sample began.
        """
        samples = self.samples
        x = self._stacked([sample.latents for sample in samples])
        if outputs.shape != x.shape:
            raise ValueError(f"outputs: found {outputs.shape}, expected {x.shape}")
        self._check_memory()
        row: dict[str, Any] = {name: self._column(name) for name in COEFFICIENTS if name != "b"}
        h = remembered(row, x, outputs)
        depth = max(sample.schedule.memory for sample in samples)
        row["b"] = [self._weights(j) for j in range(depth)]
        past = [h] + [self._stacked([_at(sample._history, j) for sample in samples]) for j in range(depth - 1)]
        previous = self._stacked([sample._previous for sample in samples])
        x_next = advanced(row, x, outputs, previous, past, self._stacked([_draw(sample) for sample in samples]))
        for i, sample in enumerate(samples):
            sample._history = [h[i], *sample._history][: sample.schedule.memory]
            sample._previous, sample.latents = sample.latents, x_next[i]
            sample.row += 1
        self.samples = [sample for sample in samples if not sample.done]
        return [sample for sample in samples if sample.done]

    def _column(self, name: str) -> NDArray[np.float32]:
        """A column's value at each sample's row, [batch, 1, 1, 1]."""
        values = [getattr(sample.schedule, name)[sample.row] for sample in self.samples]
        return np.array(values, np.float64).astype(np.float32).reshape(-1, 1, 1, 1)

    def _weights(self, j: int) -> NDArray[np.float32]:
        """b[j] at each sample's row, 0 where its memory is not so deep."""
        rows = [sample.schedule.b[sample.row] for sample in self.samples]
        values = [weights[j] if j < len(weights) else 0.0 for weights in rows]
        return np.array(values, np.float64).astype(np.float32).reshape(-1, 1, 1, 1)

    def _stacked(self, arrays: list[Latents | None]) -> Latents:
        """One array of all; nothing is zero, and not asked for."""
        shape = self.samples[0].latents.shape
        return np.stack([np.zeros(shape, np.float32) if array is None else array for array in arrays])

    def _check_memory(self) -> None:
        for sample in self.samples:
            weights = sample.schedule.b[sample.row]
            if np.any(weights[1 + len(sample._history) :]) or (
                sample._previous is None and sample.schedule.e[sample.row]
            ):
                raise ValueError(
                    f"row {sample.row} looks back to before its sample began; begin at an earlier row, or take a table "
                    "that begins there (`Steps.begin`)"
                )


def _at(history: list[Latents], index: int) -> Latents | None:
    return history[index] if index < len(history) else None


def _draw(sample: Sample) -> Latents | None:
    """The noise of a sample's row: the last of as many draws as it says."""
    z = None
    for _ in range(sample.schedule.noise_draws[sample.row]):
        assert sample.noise is not None
        z = sample.noise()
    return z

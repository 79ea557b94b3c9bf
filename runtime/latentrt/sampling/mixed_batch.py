"""How are samples of different samplers, lengths and positions drawn in one batch?

A row is all that a sampler has to say of a step, so each sample of a batch can be at a row of its own. A server adds
requests as they come and takes pictures as they are done, while the denoiser is asked once for all that are under way:

    batch = MixedBatch()
    batch.add(schedule, schedule.first_latents(noise), noise=draw)
    while batch.samples:
        timesteps, shown = batch.show()
        for sample in batch.step(model(timesteps, shown)):
            ...                                     # sample.latents are done

Each sample gets exactly what it would get alone, to the bit. A batch belongs to one thread; between `show` and `step`
samples may join, which `show` shows the next time, and leave, whose outputs are passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.schedule import Latents, Recurrence, Schedule

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
    _run: Recurrence = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._run = Recurrence(self.schedule)

    @property
    def done(self) -> bool:
        """Whether its table is at an end."""
        return self.row == len(self.schedule)

    def shown(self) -> Latents:
        """What the denoiser is shown of it."""
        return self._run.model_input(self.row, self.latents)

    def step(self, output: Latents) -> None:
        """Do its row, with the model's output."""
        z = None
        for _ in range(self.schedule.noise_draws[self.row]):
            assert self.noise is not None
            z = self.noise()
        self.latents = self._run.step(self.row, self.latents, output, z)
        self.row += 1


class MixedBatch:
    """Samples that are denoised together, each by its own table and from its own row.

    Attributes:
        samples: those under way.
    """

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._shown: list[Sample] = []

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
            row: where it begins; no row from there on may look back beyond it (`Steps.begin` makes a table that begins
                in the middle).
            noise: its next draw of standard normal noise, of the latents' shape.

        Raises:
            ValueError: the latents have another shape, the row is none of the table's or its table looks back to before
                it, or noise is drawn and there is none.
        """
        wanted = self.samples[0].latents.shape if self.samples else "(channels, height, width)"
        shape = wanted if self.samples else latents.shape
        if latents.dtype != np.float32 or latents.ndim != 3 or latents.shape != shape:
            raise ValueError(f"latents: found {latents.dtype} {latents.shape}, expected float32 {wanted}")
        if not 0 <= row < len(schedule):
            raise ValueError(f"found row {row} of a table of {len(schedule)}, expected 0 to {len(schedule) - 1}")
        if schedule.looks_back_beyond(row):
            raise ValueError(
                f"found row {row} of a table that looks back to before it; begin at an earlier row, or take a table "
                "that begins there (`Steps.begin`)"
            )
        if noise is None and np.any(schedule.noise_draws[row:]):
            raise ValueError("found no noise for a table that draws some, expected a function that gives the next draw")
        sample = Sample(schedule, row, latents, noise)
        self.samples.append(sample)
        return sample

    def cancel(self, sample: Sample) -> None:
        """Let a sample go before it is done.

        Raises:
            ValueError: it is not under way.
        """
        self.samples.remove(sample)

    def show(self) -> tuple[NDArray[np.float32], Latents]:
        """What the denoiser is to be asked: timesteps [batch] and its input [batch, channels, height, width].

        Raises:
            ValueError: no sample is under way.
        """
        if not self.samples:
            raise ValueError("found no samples under way, expected some; add one")
        self._shown = list(self.samples)
        timesteps = np.array([sample.schedule.t[sample.row] for sample in self._shown], np.float32)
        return timesteps, np.stack([sample.shown() for sample in self._shown])

    def step(self, outputs: Latents) -> list[Sample]:
        """Do a row of each sample that was shown, and let those go that are done.

        Args:
            outputs: the model's for what `show` gave, [batch, channels, height, width], taken as float32.

        Returns:
            The samples whose tables are at an end.

        Raises:
            ValueError: the outputs have another shape, or nothing was shown.
        """
        shown, self._shown = self._shown, []
        expected = (len(shown), *(shown[0].latents.shape if shown else ()))
        if not shown or outputs.shape != expected:
            self._shown = shown
            raise ValueError(
                f"outputs: found {outputs.shape}, expected {expected if shown else 'a call of show before'}"
            )
        for sample, output in zip(shown, outputs, strict=True):
            if sample in self.samples:
                sample.step(output.astype(np.float32, copy=False))
        done = [sample for sample in self.samples if sample.done]
        self.samples = [sample for sample in self.samples if not sample.done]
        return done

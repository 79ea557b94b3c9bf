"""The sampling loop: samples, each with its own schedule and row, advanced together one row at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.errors import LatentRTError, RequestError
from latentrt.sampling.denoiser import DEEP_FEATURES, Conditioning, Denoiser, Evaluation, not_finite
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.schedule import Latents, Recurrence, Schedule
from latentrt.timings import Stopwatch

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Resident", "Sample", "Step", "prepare", "step"]


class Resident(ABC):
    """The latents of a sample on a device."""

    @abstractmethod
    def fetch(self) -> Latents:
        """Return the latents after the last row; raise BackendError where a row gave values that are not finite."""

    @abstractmethod
    def replace(self, latents: Latents) -> None:
        """Continue from other latents."""


class Sample:
    """The state of one image between two rows of its schedule.

    Args:
        schedule: its table of coefficients; one row is one evaluation of the (guided) model.
        latents: float32 [C, H, W] before row `row` (`Schedule.first_latents`).
        conditioning: of each evaluation, by the names of `guidance`.
        guidance: which evaluations a row needs, and how they combine.
        noise: returns the next standard normal noise, float32 [C, H, W]; None for a schedule that uses none.
        deep_cache: N of DeepCache (Ma et al. 2023, arXiv 2312.00858): compute the denoiser's deep layers at every N-th
            row only; 1 computes them at every row.
        after_row: called with the sample after each row; it may replace the latents (the blend of inpainting).
        row: the row to begin at; the schedule must not look back beyond it.

    Raises:
        ValueError: the latents are not float32 [C, H, W], the row is not in the schedule, or noise is missing.
    """

    def __init__(
        self,
        schedule: Schedule,
        latents: Latents,
        conditioning: Mapping[str, Conditioning],
        guidance: Guidance,
        noise: Callable[[], Latents] | None = None,
        *,
        deep_cache: int = 1,
        after_row: Callable[[Sample], None] | None = None,
        row: int = 0,
    ) -> None:
        if latents.dtype != np.float32 or latents.ndim != 3:
            raise ValueError(
                f"latents: got {latents.dtype} {latents.shape}, expected float32 (channels, height, width)"
            )
        rows = len(schedule)
        if not 0 <= row < rows:
            raise ValueError(f"row: got {row}, expected 0 to {rows - 1}")
        if schedule.looks_back_beyond(row):
            raise ValueError(f"row: got {row}, but the schedule looks back beyond it; begin at an earlier row")
        if noise is None and np.any(schedule.noise_draws[row:]):
            raise ValueError("noise: got None for a schedule that draws noise, expected a function")
        self.schedule, self.guidance, self.noise = schedule, guidance, noise
        self._latents: Latents | None = latents
        self._resident: Resident | None = None
        self._error: LatentRTError | None = None
        self.deep_cache, self.after_row, self.row, self._rows = deep_cache, after_row, row, rows
        self._shape: tuple[int, ...] = latents.shape
        self._recurrence = Recurrence(schedule)
        self._evaluations = {name: Evaluation(each, latents.shape, schedule.t) for name, each in conditioning.items()}

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the latents, (C, H, W)."""
        return self._shape

    @property
    def latents(self) -> Latents:
        """The latents before row `row`, float32 [C, H, W]; fetched from the device if they are there.

        Raises:
            BackendError: a row on the device gave values that are not finite.
        """
        if self._error is not None:
            raise self._error
        if self._resident is not None:
            return self._resident.fetch()
        assert self._latents is not None, "on the host"
        return self._latents

    @latents.setter
    def latents(self, latents: Latents) -> None:
        if self._resident is not None:
            self._resident.replace(latents)
        else:
            self._latents = latents

    @property
    def on_host(self) -> Latents | None:
        """The latents, float32 [C, H, W]; None if a device has them, or a row failed."""
        return self._latents if self._error is None else None

    def join_device(self, resident: Resident) -> None:
        """Replace the latents on the host by those on a device."""
        self._resident, self._latents = resident, None

    def leave_device(self) -> None:
        """Fetch the latents to the host; an error is raised when they are read."""
        if self._resident is None:
            return
        try:
            self._latents = self._resident.fetch()
        except LatentRTError as error:
            self._error = error
        self._resident = None

    @property
    def done(self) -> bool:
        """Whether every row has been computed."""
        return self.row == self._rows

    def evaluations(self) -> list[Evaluation]:
        """Return the evaluations that the next row needs."""
        return [self._evaluations[name] for name in self.guidance.evaluations(self.row, self._rows)]

    def all_evaluations(self) -> list[list[Evaluation]]:
        """Return the evaluations of every kind of row that is left: guided, unguided."""
        kinds = dict.fromkeys(self.guidance.evaluations(row, self._rows) for row in range(self.row, self._rows))
        return [[self._evaluations[name] for name in kind] for kind in kinds]

    def reuses_features(self, evaluations: Sequence[Evaluation]) -> bool:
        """Return whether the next row takes deep features of an earlier one, which each evaluation then has."""
        return self.row % self.deep_cache != 0 and all(DEEP_FEATURES in each.kept for each in evaluations)

    def draw_noise(self) -> Latents | None:
        """Return the next row's noise, float32 [C, H, W], or None: the last of its draws, the others are discarded."""
        z = None
        for _ in range(self.schedule.noise_draws[self.row]):
            assert self.noise is not None, "checked when the sample was made"
            z = self.noise()
        return z

    def model_input(self) -> Latents:
        """Return the scaled latents [C, H, W] of the next row."""
        return self._recurrence.model_input(self.row, self.latents)

    def advance(self, outputs: Sequence[Latents]) -> None:
        """Compute the next row from the denoiser's outputs [C, H, W], one for each evaluation.

        Raises:
            BackendError: the latents are not finite.
        """
        z = self.draw_noise()
        latents = self._recurrence.step(self.row, self.latents, self.guidance.combine(outputs), z)
        if not np.isfinite(latents).all():
            raise not_finite(self.schedule.t[self.row])
        self._latents = latents
        self.row += 1
        if self.after_row is not None:
            self.after_row(self)


def prepare(samples: Sequence[Sample], denoiser: Denoiser) -> None:
    """Load or compile the denoiser for all remaining rows of these samples.

    Raises:
        EngineError: no engine covers the shapes of a row.
    """
    needed: dict[Any, list[Evaluation]] = {}
    for sample in samples:
        for evaluations in sample.all_evaluations():
            for evaluation in evaluations:
                needed.setdefault((evaluation.signature, len(evaluations)), []).append(evaluation)
    for group in needed.values():
        denoiser.prepare(group)


def step(samples: Sequence[Sample], denoiser: Denoiser) -> None:
    """Advance each sample by one row of its own schedule.

    The evaluations of all samples are grouped by the shapes of their inputs; the denoiser runs once for each group.
    Samples may differ in sampler, row, number of steps, guidance and prompt.

    Raises:
        ValueError: a sample is done, or in the list twice.
        BackendError: the denoiser failed or returned values that are not finite.
        EngineError: no engine covers the shapes of a group.
    """
    if any(sample.done for sample in samples) or len({*map(id, samples)}) < len(samples):
        raise ValueError("got a sample that is done, or one sample twice; expected samples with rows to run")
    samples = denoiser.step_on_device(samples)
    groups: dict[tuple[Any, bool], list[tuple[int, int, Evaluation]]] = {}
    inputs, outputs = [], []
    for index, sample in enumerate(samples):
        evaluations = sample.evaluations()
        reuse = sample.reuses_features(evaluations)
        inputs.append(sample.model_input())
        outputs.append([inputs[-1]] * len(evaluations))  # replaced below
        for place, evaluation in enumerate(evaluations):
            groups.setdefault((evaluation.signature, reuse), []).append((index, place, evaluation))
    for (_, reuse), group in groups.items():
        results = denoiser.evaluate(
            [evaluation for *_, evaluation in group],
            [inputs[index] for index, *_ in group],
            [samples[index].schedule.t[samples[index].row] for index, *_ in group],
            reuse=reuse,
        )
        for (index, place, _), result in zip(group, results, strict=True):
            outputs[index][place] = result
    for sample, each in zip(samples, outputs, strict=True):
        sample.advance(each)


class Step:
    """A completed model evaluation of a request, as the sampling loop yields it.

    Args:
        samples: the request's, all with one schedule.
        stopwatch: of the request.
        decode_preview: returns quickly decoded, checked images of latents.

    Attributes:
        index, total: index of the row and number of rows; a sampler may need more evaluations than steps.
        timestep: the row's `Schedule.t`.
        stopwatch: as given.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        stopwatch: Stopwatch | None = None,
        decode_preview: Callable[[Latents], list[Image.Image]] | None = None,
    ) -> None:
        first = samples[0]
        self.index, self.total = first.row - 1, len(first.schedule)
        self.timestep = float(first.schedule.t[self.index])
        self.stopwatch = Stopwatch() if stopwatch is None else stopwatch
        self._decode_preview = decode_preview
        self._samples, self._computed = samples, [sample.on_host for sample in samples]
        self._latents: Any = None
        self._was_read = False

    def __repr__(self) -> str:
        return f"<Step {self.index + 1} of {self.total}, timestep {self.timestep:g}>"

    @property
    def latents(self) -> Latents:
        """The latents after the step, float32 [images, C, H, W]; replaced or changed ones are used by the next step.

        Raises:
            RequestError: they were on a device, and the loop has been resumed.
            BackendError: a row on a device gave values that are not finite.
        """
        if not self._was_read:
            self._latents, self._was_read = self._read(), True
        latents: Latents = self._latents
        return latents

    @latents.setter
    def latents(self, latents: Latents) -> None:
        self._latents, self._was_read = latents, True

    def preview(self) -> list[Image.Image]:
        """Return what the images look like so far, by the bundle's preview decoder, checked by the request's policy.

        The noise of the step is removed only as far as its level tells, without another evaluation of the model.

        Raises:
            RequestError: the bundle has no preview decoder, or the latents are no longer available (see `latents`).
            SafetyError: the classifier failed.
        """
        if self._decode_preview is None:
            raise RequestError("got a step without a pipeline, expected one of `Pipeline.steps`; it has no preview")
        schedule, row = self._samples[0].schedule, self.index + 1
        latents = self._check_changed() if self._was_read else self._read()
        if row < self.total:
            # x = α · x0 + σ · z: the linear estimate of x0 with the least error, for x0 of variance 1 as z has.
            alpha, sigma = schedule.alpha[row], schedule.sigma[row]
            latents = latents * np.float32(alpha / (alpha**2 + sigma**2))
        return self._decode_preview(latents)

    def _read(self) -> Latents:
        with self.stopwatch.measure("sampling"):  # a device may still be at it
            pairs = zip(self._samples, self._computed, strict=True)
            return np.stack([self._read_sample(*each) for each in pairs])

    def _read_sample(self, sample: Sample, computed: Latents | None) -> Latents:
        if computed is not None:
            return computed
        if sample.row != self.index + 1:
            raise RequestError(
                f"the latents after row {self.index + 1} are no longer available at row {sample.row}; read them before "
                "the generator of steps is resumed"
            )
        return sample.latents

    def write_back(self) -> None:
        """Write the latents back to the samples, if they were read or replaced.

        Raises:
            RequestError: they are not finite numbers of the same shape.
        """
        if not self._was_read:
            return  # latents that were never read cannot have been changed
        self._latents = self._check_changed()
        for sample, each in zip(self._samples, self._latents, strict=True):
            sample.latents = each

    def _check_changed(self) -> Latents:
        """Return latents that the consumer may have changed as float32; raise RequestError as `write_back` does."""
        shape = (len(self._samples), *self._samples[0].shape)
        if not isinstance(self._latents, np.ndarray) or self._latents.shape != shape:
            got = getattr(self._latents, "shape", type(self._latents).__name__)
            raise RequestError(
                f"the callback returned latents of shape {got}; expected a finite array of shape {shape}"
            )
        if not np.issubdtype(self._latents.dtype, np.floating) or not np.isfinite(self._latents).all():
            raise RequestError(f"the callback returned latents that are not finite; expected finite numbers, {shape}")
        return self._latents.astype(np.float32, copy=False)

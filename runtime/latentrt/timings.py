"""Timings of a request: seconds of each kind of work, measured where the work is done.

A `Stopwatch` belongs to one request. Whoever drives the work starts a phase with `Stopwatch.measure`; code below it
that does another kind of work (a component that is loaded, a prompt that is encoded) is marked with `measured`, and
knows of no stopwatch. Phases exclude each other: an inner one interrupts the outer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from time import perf_counter
from typing import Literal, get_args

__all__ = ["Phase", "Stopwatch", "Timings", "measured"]

Phase = Literal["loading", "text_encoding", "image_encoding", "sampling", "decoding", "safety_check"]


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds that a request took, by kind of work; 0 for work that it did not need.

    Attributes:
        loading_s: loading and compiling components, or waiting until another thread has loaded them; the next request
            finds them loaded.
        text_encoding_s: prompts to embeddings, with the tokenizer.
        image_encoding_s: input images to latents, embeddings or depth.
        sampling_s: the sampling loop, until the last latents are on the host.
        decoding_s: latents to pixels.
        safety_check_s: the classifier.
        total_s: wall-clock time from the call to the result; callbacks and previews are included here alone.
    """

    loading_s: float = 0.0
    text_encoding_s: float = 0.0
    image_encoding_s: float = 0.0
    sampling_s: float = 0.0
    decoding_s: float = 0.0
    safety_check_s: float = 0.0
    total_s: float = 0.0

    def __repr__(self) -> str:
        shown = (f"{name}={value:.3f}" for name, value in vars(self).items() if value)
        return f"Timings({', '.join(shown)})"


class Stopwatch:
    """Measures the phases of one request. It runs from when it is made, and belongs to one thread at a time."""

    def __init__(self) -> None:
        self._began = self._since = perf_counter()
        self._seconds: dict[Phase, float] = dict.fromkeys(get_args(Phase), 0.0)
        self._phases: list[Phase] = []  # the innermost last

    @contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        """Count the time within the block as `phase`, except what an inner block counts as another."""
        token = _running.set(self)
        self._split()
        self._phases.append(phase)
        try:
            yield
        finally:
            self._split()
            self._phases.pop()
            _running.reset(token)

    def timings(self) -> Timings:
        """Return the seconds of each phase until now, and all since the stopwatch was made."""
        self._split()
        seconds = {f"{phase}_s": value for phase, value in self._seconds.items()}
        return Timings(**seconds, total_s=perf_counter() - self._began)

    def _split(self) -> None:
        """Add the time since the last split to the innermost phase."""
        now = perf_counter()
        if self._phases:
            self._seconds[self._phases[-1]] += now - self._since
        self._since = now


_running: ContextVar[Stopwatch | None] = ContextVar("_running", default=None)


@contextmanager
def measured(phase: Phase) -> Iterator[None]:
    """Count a block, or a function that this decorates, as `phase` of the request that is measured here, if one is."""
    stopwatch = _running.get()
    if stopwatch is None:
        yield
        return
    with stopwatch.measure(phase):
        yield

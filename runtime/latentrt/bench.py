"""How long does each submodule take, and a whole picture, on one backend?

Measured in a process of its own (`python -m latentrt.bench`), so that the first picture is cold and the peak of memory
is this backend's alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, Shapes
from latentrt.errors import LatentRTError
from latentrt.worker_process import Failed, peak_bytes, take_job

if TYPE_CHECKING:
    from latentrt.backends.placement import Placement

__all__ = ["BenchJob", "Measured", "Message", "Quantiles", "TimedSession", "quantiles", "timed"]

_MS = 1000.0


class BenchJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure: `runs` pictures after the first."""

    bundle: str
    digest: str
    device: str
    provider: str | None
    threads: int | None
    precision: str | None
    low_memory: bool
    prompt: str
    width: int | None
    height: int | None
    steps: int | None
    batch: int
    runs: int


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of `count` durations, in milliseconds, by nearest rank: with fewer than 100, the 99th is the longest."""

    count: int
    p50_ms: float
    p90_ms: float
    p99_ms: float


class Measured(msgspec.Struct, frozen=True, tag="measured", kw_only=True):
    """What one backend took.

    Attributes:
        runs_on: submodule → what runs it, in words.
        load_ms: from nothing imported to a bundle that is open and a device that is chosen.
        first_ms: the first picture, loading graphs and weights included.
        picture: pictures after the first. submodules: their runs in those, by name.
        peak_bytes: the largest resident set. gpu_bytes: the GPU's memory in use at the end, whoever uses it.
    """

    runs_on: dict[str, str]
    load_ms: float
    first_ms: float
    picture: Quantiles
    submodules: dict[str, Quantiles]
    peak_bytes: int
    gpu_bytes: int | None


Message = Measured | Failed


class TimedSession(Session):
    """A session that records how long each run took, in milliseconds."""

    def __init__(self, session: Session, durations_ms: list[float]) -> None:
        self.inputs, self.outputs = session.inputs, session.outputs
        self._session, self._durations_ms = session, durations_ms

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        began = time.perf_counter()
        outputs = self._session.run(feeds)
        self._durations_ms.append((time.perf_counter() - began) * _MS)
        return outputs

    def batch_sizes(self, shapes: Shapes) -> tuple[int, ...] | None:
        return self._session.batch_sizes(shapes)

    def prepare(self, shapes: Shapes) -> None:
        self._session.prepare(shapes)  # not timed

    def close(self) -> None:
        self._session.close()


def timed(placement: Placement, durations_ms: list[float]) -> Placement:
    """Return a placement whose sessions record how long each run took."""
    key = ("timed", id(durations_ms), *placement.key)
    return replace(placement, open=lambda part: TimedSession(placement.open(part), durations_ms), key=key)


def quantiles(durations_ms: Sequence[float]) -> Quantiles:
    """The median, the 90th and the 99th percentile by nearest rank."""
    ordered = sorted(durations_ms)

    def rank(share: float) -> float:
        return round(ordered[max(math.ceil(share * len(ordered)) - 1, 0)], 3)

    return Quantiles(count=len(ordered), p50_ms=rank(0.5), p90_ms=rank(0.9), p99_ms=rank(0.99))


def main() -> None:
    """Read the job, do it, report."""
    line, report = take_job()
    try:
        report(_measure(msgspec.json.decode(line, type=BenchJob)))
    except LatentRTError as error:
        report(Failed.of(error))


def _measure(job: BenchJob) -> Measured:
    began = time.perf_counter()
    draw, runs_on, taken = _prepare(job)
    loaded = time.perf_counter()
    draw()
    first = time.perf_counter()
    for durations in taken.values():
        durations.clear()
    pictures = list(_timed(draw, job.runs))
    return Measured(
        runs_on=dict(runs_on),
        load_ms=round((loaded - began) * _MS, 3),
        first_ms=round((first - loaded) * _MS, 3),
        picture=quantiles(pictures),
        submodules={name: quantiles(durations) for name, durations in taken.items() if durations},
        peak_bytes=peak_bytes(),
        gpu_bytes=_gpu_bytes(),
    )


def _prepare(job: BenchJob) -> tuple[Callable[[], object], Mapping[str, str], dict[str, list[float]]]:
    """What draws one picture, what each submodule runs on, and where their durations go."""
    from latentrt.backends.models import Components
    from latentrt.backends.placement import Preferences, place_components
    from latentrt.bundle.bundle import Bundle
    from latentrt.pipeline import Pipeline

    bundle = Bundle.open(job.bundle, job.digest)
    device: Any = job.device
    precision: Any = job.precision
    preferences = Preferences(threads=job.threads, precision=precision, low_memory=job.low_memory)
    placements = place_components(bundle, device, provider=job.provider, preferences=preferences)
    durations: dict[str, list[float]] = {name: [] for name in placements}
    measured = {name: timed(placement, durations[name]) for name, placement in placements.items()}
    pipeline = Pipeline(bundle, Components(measured, low_memory=job.low_memory))
    # A bundle without a classifier is measured without one.
    safety = None if bundle.manifest.by_role("classifier") else "off"

    def draw() -> object:
        return pipeline(
            job.prompt,
            seed=0,
            width=job.width,
            height=job.height,
            num_inference_steps=job.steps,
            num_images_per_prompt=job.batch,
            safety=safety,
            output_type="np",
        )

    return draw, {name: str(placement) for name, placement in placements.items()}, durations


def _timed(draw: Callable[[], object], runs: int) -> Iterator[float]:
    for _ in range(runs):
        began = time.perf_counter()
        draw()
        yield (time.perf_counter() - began) * _MS


def _gpu_bytes() -> int | None:
    from latentrt.backends.cuda.api import load_cuda

    try:
        free, total = load_cuda().memory()
    except LatentRTError:
        return None
    return total - free


if __name__ == "__main__":
    main()

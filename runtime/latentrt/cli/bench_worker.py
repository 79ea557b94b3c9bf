"""The worker process of `latentrt bench`: measures a bundle on one backend (`python -m latentrt.cli.bench_worker`).

In a separate process the first image is cold, and the memory peak is this backend's alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session, Shapes
from latentrt.cli.bench_messages import BenchJob, Generated, Measurement, quantiles
from latentrt.engines.gpu import gpu_memory_in_use
from latentrt.errors import LatentRTError
from latentrt.worker_process import Failed, peak_bytes, take_job

if TYPE_CHECKING:
    from latentrt.backends.placement import Placement

__all__ = ["TimedSession", "time_placement"]

_MS = 1000.0
_JOBS = msgspec.json.Decoder(BenchJob)


class TimedSession(Session):
    """A session that appends the duration of each run, in milliseconds, to a list."""

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


def time_placement(placement: Placement, durations_ms: list[float]) -> Placement:
    """Return a placement whose sessions append the duration of each run, in milliseconds, to a list."""
    key = ("timed", id(durations_ms), *placement.key)
    return replace(placement, open=lambda part: TimedSession(placement.open(part), durations_ms), key=key)


def main() -> None:
    """Read a job from standard input, measure, and report."""
    line, report = take_job()
    try:
        report(_measure(_JOBS.decode(line), lambda count: report(Generated(count=count))))
    except LatentRTError as error:
        report(Failed.of(error))


def _measure(job: BenchJob, progress: Callable[[int], None]) -> Measurement:
    began = time.perf_counter()
    generate, runs_on, durations_ms = _load(job)
    loaded = time.perf_counter()
    generate()
    first = time.perf_counter()
    progress(1)
    for each in durations_ms.values():
        each.clear()
    images_ms = []
    for run in range(job.runs):
        start = time.perf_counter()
        generate()
        images_ms.append((time.perf_counter() - start) * _MS)
        progress(run + 2)
    return Measurement(
        runs_on=dict(runs_on),
        load_ms=round((loaded - began) * _MS, 3),
        first_ms=round((first - loaded) * _MS, 3),
        image=quantiles(images_ms),
        components={name: quantiles(each) for name, each in durations_ms.items() if each},
        peak_bytes=peak_bytes(),
        gpu_bytes=gpu_memory_in_use(),
    )


def _load(job: BenchJob) -> tuple[Callable[[], object], Mapping[str, str], dict[str, list[float]]]:
    """Return a function that generates images once, and by component the backend's description and the durations."""
    from latentrt.backends.models import Components
    from latentrt.backends.placement import Preferences, place_components
    from latentrt.bundle.bundle import Bundle
    from latentrt.pipeline import Pipeline

    bundle = Bundle.open(job.bundle, job.digest)
    device: Any = job.device
    precision: Any = job.precision
    preferences = Preferences(threads=job.threads, precision=precision, low_memory=job.low_memory)
    placements = place_components(bundle, device, provider=job.provider, preferences=preferences)
    durations_ms: dict[str, list[float]] = {name: [] for name in placements}
    timed = {name: time_placement(placement, durations_ms[name]) for name, placement in placements.items()}
    pipeline = Pipeline(bundle, Components(timed, low_memory=job.low_memory), progress=False)
    # A bundle without a classifier is measured without the safety check.
    safety = None if bundle.manifest.by_role("classifier") else "off"

    def generate() -> object:
        return pipeline(
            job.prompt,
            seed=0,
            num_images_per_prompt=job.batch,
            safety=safety,
            output_type="np",
            **job.options,
        )

    return generate, {name: str(placement) for name, placement in placements.items()}, durations_ms


if __name__ == "__main__":
    main()

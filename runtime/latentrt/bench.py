"""How long does each submodule take, and a whole picture, on one backend?

Measured in a process of its own (`python -m latentrt.bench`), so that the first picture is cold and the peak of memory
is this backend's alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session
from latentrt.backends.split_denoiser import InParts, ReusesFeatures
from latentrt.backends.submodules import Prepares
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import LatentRTError
from latentrt.sampling.schedule import Latents
from latentrt.sampling.trajectory import Denoising, KeepsLatents, Trajectory
from latentrt.worker_process import Failed, peak_bytes, take_job

__all__ = ["BenchJob", "Measured", "Message", "Quantiles", "TimedDenoiser", "TimedSession", "quantiles", "timed"]

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


class TimedSession:
    """A session that keeps how long each run took, in milliseconds."""

    def __init__(self, session: Session, durations_ms: list[float]) -> None:
        self._session, self._durations_ms = session, durations_ms

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._session.inputs

    def prepare(self, sizes: Mapping[str, int]) -> None:
        """`latentrt.backends.submodules.Prepares`, which does not count."""
        if isinstance(self._session, Prepares):
            self._session.prepare(sizes)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        began = time.perf_counter()
        outputs = self._session.run(feeds)
        self._durations_ms.append((time.perf_counter() - began) * _MS)
        return outputs


class TimedDenoiser(TimedSession):
    """The same for a denoiser that keeps latents on its device: how long each row of its loop took. The host is a row
    ahead, so what it waits for is the row before."""

    def trajectory(self, job: Denoising) -> Trajectory | None:
        """`latentrt.sampling.trajectory.KeepsLatents`."""
        assert isinstance(self._session, KeepsLatents)
        loop = self._session.trajectory(job)
        return None if loop is None else _TimedTrajectory(loop, self._durations_ms)


class TimedInParts(TimedSession):
    """The same for a denoiser in parts, of which each run has its own."""

    def begin(self, timesteps: NDArray[np.float32]) -> Session:
        """`latentrt.backends.split_denoiser.InParts`."""
        assert isinstance(self._session, InParts)
        return TimedRun(self._session.begin(timesteps), self._durations_ms)


class TimedRun(TimedSession):
    """The same for such a run."""

    def run_reusing(self, feeds: Mapping[str, NDArray[Any]], deep_features: NDArray[np.float32]) -> Arrays:
        """`latentrt.backends.split_denoiser.ReusesFeatures`."""
        assert isinstance(self._session, ReusesFeatures)
        began = time.perf_counter()
        outputs = self._session.run_reusing(feeds, deep_features)
        self._durations_ms.append((time.perf_counter() - began) * _MS)
        return outputs


class _TimedTrajectory:
    def __init__(self, loop: Trajectory, durations_ms: list[float]) -> None:
        self._loop, self._durations_ms = loop, durations_ms

    def step(self, changed: Latents | None) -> Callable[[], Latents]:
        began = time.perf_counter()
        fetch = self._loop.step(changed)
        self._durations_ms.append((time.perf_counter() - began) * _MS)
        return fetch

    def close(self) -> None:
        self._loop.close()


def timed(session: Session, durations_ms: list[float]) -> TimedSession:
    """The session, keeping how long it takes."""
    if isinstance(session, KeepsLatents):
        return TimedDenoiser(session, durations_ms)
    return (TimedInParts if isinstance(session, InParts) else TimedSession)(session, durations_ms)


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
    from latentrt.backends.cpu_choice import Preferences
    from latentrt.backends.device import choose_sessions
    from latentrt.bundle.bundle import Bundle
    from latentrt.pipeline import Pipeline

    bundle = Bundle.open(job.bundle, job.digest)
    device: Any = job.device
    precision: Any = job.precision
    preferences = Preferences(threads=job.threads, precision=precision, low_memory=job.low_memory)
    sessions = choose_sessions(bundle, device, provider=job.provider, preferences=preferences)
    durations: dict[str, list[float]] = {name: [] for name in bundle.manifest.components}
    timed_sessions = sessions.wrapped(lambda name, session: timed(session, durations[name]))
    pipeline = Pipeline(bundle, timed_sessions, low_memory=job.low_memory)
    # A bundle without a classifier is measured without one.
    safety = None if "safety_checker" in bundle.manifest.components else "off"

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

    return draw, sessions.choices, durations


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

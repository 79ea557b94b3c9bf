"""The job of `latentrt bench`'s worker process, its messages, and percentiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from latentrt.worker_process import Failed

__all__ = ["LEAST_RUNS", "MESSAGES", "BenchJob", "Generated", "Measurement", "Quantiles", "quantiles"]

LEAST_RUNS = {"p90_ms": 10, "p99_ms": 100}
"""Number of durations from which a percentile is another one than the longest."""


class BenchJob(msgspec.Struct, frozen=True, kw_only=True):
    """A bundle, a backend and a request to measure: `runs` requests after the first."""

    bundle: str
    digest: str
    device: str
    provider: str | None
    threads: int | None
    precision: str | None
    low_memory: bool
    prompt: str
    batch: int
    runs: int
    options: dict[str, Any] = {}  # of the request, by their keywords


class Quantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Percentiles of `count` durations, by nearest rank; None with fewer than 10 (`p90_ms`) or 100 (`p99_ms`)."""

    count: int
    p50_ms: float
    p90_ms: float | None
    p99_ms: float | None
    max_ms: float


class Generated(msgspec.Struct, frozen=True, tag="generated", kw_only=True):
    """The number of requests that are done."""

    count: int


class Measurement(msgspec.Struct, frozen=True, tag="measurement", kw_only=True):
    """Times and memory of one backend.

    Attributes:
        runs_on: a description of the backend that runs each component and why, by component.
        load_ms: from the first import to an open bundle with every component placed.
        first_ms: the first request, including loading of graphs and weights.
        image: requests after the first, each of a batch of images.
        components: runs of each component's graphs for these requests, by component.
        peak_bytes: the largest resident set.
        gpu_bytes: GPU memory in use at the end, by all processes; None without a GPU.
    """

    runs_on: dict[str, str]
    load_ms: float
    first_ms: float
    image: Quantiles
    components: dict[str, Quantiles]
    peak_bytes: int
    gpu_bytes: int | None


Message = Measurement | Generated | Failed
MESSAGES: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)


def quantiles(durations_ms: Sequence[float]) -> Quantiles:
    """Return the median, the 90th and the 99th percentile by nearest rank, and the longest."""
    ordered = sorted(durations_ms)

    def rank(share: float) -> float:
        return round(ordered[max(math.ceil(share * len(ordered)) - 1, 0)], 3)

    return Quantiles(
        count=len(ordered),
        p50_ms=rank(0.5),
        p90_ms=rank(0.9) if len(ordered) >= LEAST_RUNS["p90_ms"] else None,
        p99_ms=rank(0.99) if len(ordered) >= LEAST_RUNS["p99_ms"] else None,
        max_ms=rank(1),
    )

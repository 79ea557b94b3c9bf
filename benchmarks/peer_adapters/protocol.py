"""What is measured of a peer, inside its own process, and how it says so?

Needs nothing but the standard library, as each peer's environment has only what that peer asks for. The parent gives a
job as a line of JSON on standard input and reads two lines from standard output: after the pictures, and at the end.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Drawn", "Job", "Peer", "noise", "serve"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure.

    Attributes:
        model: where the peer's own form of the checkpoint lies. options: what else its adapter is told.
        side: of the picture, in pixels. seed: whose noise `latents` holds, for a peer that makes its own.
        latents: a file of float32 [1, 4, height, width], standard normal, as high as wide.
        picture: where the first picture goes, uint8 [side, side, 3].
        pictures: how many are drawn after the first; None draws none at all.
        calls: how often each submodule is run apart, after one call that does not count.
        began: what `time.monotonic` said when the process was started.
    """

    model: str
    options: dict[str, Any]
    prompt: str
    side: int
    steps: int
    guidance_scale: float
    threads: int
    seed: int
    latents: str
    picture: str
    pictures: int | None
    calls: int
    began: float


@dataclass(frozen=True)
class Drawn:
    """A picture, uint8 [side, side, 3]; and how long submodules took in it, in seconds, where only the peer knows."""

    pixels: bytes
    submodules: Mapping[str, float] = field(default_factory=dict)


class Peer(Protocol):
    """A peer that is loaded."""

    def draw(self, step_ended: Callable[[], None]) -> Drawn:
        """Draw a picture; call `step_ended` whenever the sampler has made a step."""

    def submodules(self) -> Mapping[str, Callable[[], object]]:
        """What runs each submodule apart: `text_encoder` on the prompt and the negative prompt, `unet` on a batch of 2,
        `vae_decoder` from latents to pixels. Nothing is drawn any more once this was asked for."""


def serve(load: Callable[[Job], Peer]) -> None:
    """Do the job that stands on standard input."""
    # Libraries print; the messages have the real standard output to themselves.
    report_to = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job(**json.loads(sys.stdin.readline()))
    peer = load(job)
    pictures: dict[str, Any] = {"load_s": time.monotonic() - job.began}
    if job.pictures is not None:
        pictures |= _pictures(peer, job)
    print(json.dumps(pictures | {"peak_resident_bytes": _largest_resident_set()}), file=report_to)
    print(json.dumps({"submodules": _submodules(peer, job)}), file=report_to)


def _pictures(peer: Peer, job: Job) -> dict[str, Any]:
    """The first picture, from the start of the process on; then those of a warm one."""
    first = peer.draw(lambda: None)
    first_s = time.monotonic() - job.began
    Path(job.picture).write_bytes(first.pixels)
    picture_s, step_s, within = [], [], [first.submodules]
    for _ in range(job.pictures or 0):
        ended: list[float] = []
        began = time.perf_counter()
        drawn = peer.draw(lambda ended=ended: ended.append(time.perf_counter()))  # type: ignore[misc]
        picture_s.append(time.perf_counter() - began)
        step_s += [later - earlier for earlier, later in pairwise(ended)]
        within.append(drawn.submodules)
    warm = within[1:] or within
    return {
        "first_picture_s": first_s,
        "picture_s": picture_s,
        "step_s": step_s,
        "submodules": {name: [each[name] for each in warm] for name in warm[0]},
    }


def _submodules(peer: Peer, job: Job) -> dict[str, list[float]]:
    return {name: _durations(call, job.calls) for name, call in peer.submodules().items()} if job.calls else {}


def _durations(call: Callable[[], object], count: int) -> list[float]:
    call()
    durations = []
    for _ in range(count):
        began = time.perf_counter()
        call()
        durations.append(time.perf_counter() - began)
    return durations


def _largest_resident_set() -> int:
    """In bytes. Not `ru_maxrss`, which a child inherits from a large parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def noise(job: Job) -> tuple[bytes, tuple[int, int, int, int]]:
    """What the picture begins with: float32, and its shape."""
    values = Path(job.latents).read_bytes()
    side = math.isqrt(len(values) // 16)
    return values, (1, 4, side, side)

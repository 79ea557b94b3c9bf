"""What is measured of a peer, inside its own process, and how it says so?

Needs nothing but the standard library, as each peer's environment has only what that peer asks for. The parent gives a
job as a line of JSON on standard input and reads two lines from standard output: after the images, and at the end.
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

__all__ = ["GeneratedImage", "Job", "Peer", "noise", "serve"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to measure.

    Attributes:
        model: where the peer's own form of the checkpoint lies. options: what else its adapter is told.
        side: of the image, in pixels. seed: whose noise `latents` holds, for a peer that makes its own.
        latents: a file of float32 [1, 4, height, width], standard normal, as high as wide.
        image: where the first image goes, uint8 [side, side, 3].
        images: how many are drawn after the first; None draws none at all.
        calls: how often each component is run apart, after one call that does not count.
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
    image_file: str
    images: int | None
    calls: int
    began: float


@dataclass(frozen=True)
class GeneratedImage:
    """An image, uint8 [side, side, 3]; and how long components took in it, in seconds, where only the peer knows."""

    pixels: bytes
    components: Mapping[str, float] = field(default_factory=dict)


class Peer(Protocol):
    """A peer that is loaded."""

    def generate(self, step_ended: Callable[[], None]) -> GeneratedImage:
        """Draw an image; call `step_ended` whenever the sampler has made a step."""

    def components(self) -> Mapping[str, Callable[[], object]]:
        """What runs each component apart: `text_encoder` on the prompt and the negative prompt, `unet` on a batch of 2,
        `vae_decoder` from latents to pixels. Nothing is drawn any more once this was asked for."""


def serve(load: Callable[[Job], Peer]) -> None:
    """Do the job that stands on standard input."""
    # Libraries print; the messages have the real standard output to themselves.
    report_to = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = Job(**json.loads(sys.stdin.readline()))
    peer = load(job)
    images: dict[str, Any] = {"load_s": time.monotonic() - job.began}
    if job.images is not None:
        images |= _images(peer, job)
    print(json.dumps(images | {"peak_resident_bytes": _largest_resident_set()}), file=report_to)
    print(json.dumps({"components": _components(peer, job)}), file=report_to)


def _images(peer: Peer, job: Job) -> dict[str, Any]:
    """The first image, from the start of the process on; then those of a warm one."""
    first = peer.generate(lambda: None)
    first_s = time.monotonic() - job.began
    Path(job.image_file).write_bytes(first.pixels)
    image_s, step_s, within = [], [], [first.components]
    for _ in range(job.images or 0):
        ended: list[float] = []
        began = time.perf_counter()
        drawn = peer.generate(lambda ended=ended: ended.append(time.perf_counter()))  # type: ignore[misc]
        image_s.append(time.perf_counter() - began)
        step_s += [later - earlier for earlier, later in pairwise(ended)]
        within.append(drawn.components)
    warm = within[1:] or within
    return {
        "first_image_s": first_s,
        "image_s": image_s,
        "step_s": step_s,
        "components": {name: [each[name] for each in warm] for name in warm[0]},
    }


def _components(peer: Peer, job: Job) -> dict[str, list[float]]:
    return {name: _durations(call, job.calls) for name, call in peer.components().items()} if job.calls else {}


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
    """What the image begins with: float32, and its shape."""
    values = Path(job.latents).read_bytes()
    side = math.isqrt(len(values) // 16)
    return values, (1, 4, side, side)

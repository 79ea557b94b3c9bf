"""The protocol of an adapter: the job, the measurements inside its process, the messages.

It imports only the standard library, because each peer's environment has only that peer's packages. The parent writes a
job as a line of JSON to standard input and reads two lines from standard output: after the images, and at the end.
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
    """The measurements to take.

    Attributes:
        model: the path of the peer's form of the checkpoint.
        options: the options of its adapter.
        side: the side of the image, in pixels.
        seed: the seed of the noise in `latents`, for a peer that generates its own.
        latents: a file of float32 [1, 4, side, side], standard normal.
        image_file: the file for the first image, uint8 [side, side, 3].
        images: the number of images after the first; None for no image at all.
        calls: the number of calls of each component alone, after an untimed one.
        began: `time.monotonic` at the start of the process.
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
    """An image, uint8 [side, side, 3], and the seconds of each component, if only the peer can time them."""

    pixels: bytes
    components: Mapping[str, float] = field(default_factory=dict)


class Peer(Protocol):
    """A loaded peer."""

    def generate(self, step_ended: Callable[[], None]) -> GeneratedImage:
        """Generate an image; call `step_ended` after each step of the sampler."""

    def components(self) -> Mapping[str, Callable[[], object]]:
        """Return functions that run each component alone; no image is generated after this.

        `text_encoder` runs on the prompt and the negative prompt, `unet` on a batch of 2, `vae_decoder` from latents to
        pixels.
        """


def serve(load: Callable[[Job], Peer]) -> None:
    """Read a job from standard input and write its measurements to standard output."""
    # Libraries print to standard output, so it is redirected and only the messages go to the original one.
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
    """Time the first image from the start of the process, then images of the warm process."""
    first = peer.generate(lambda: None)
    first_s = time.monotonic() - job.began
    Path(job.image_file).write_bytes(first.pixels)
    image_s, step_s, within = [], [], [first.components]
    for _ in range(job.images or 0):
        ended: list[float] = []
        began = time.perf_counter()
        generated = peer.generate(lambda ended=ended: ended.append(time.perf_counter()))  # type: ignore[misc]
        image_s.append(time.perf_counter() - began)
        step_s += [later - earlier for earlier, later in pairwise(ended)]
        within.append(generated.components)
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
    """Return the peak in bytes. Not `ru_maxrss`, which a child inherits from a large parent."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def noise(job: Job) -> tuple[bytes, tuple[int, int, int, int]]:
    """Return the job's noise as bytes of float32, and its shape."""
    values = Path(job.latents).read_bytes()
    side = math.isqrt(len(values) // 16)
    return values, (1, 4, side, side)

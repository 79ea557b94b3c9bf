"""Counts the Python work of one request: source files entered, calls, and frames between the call and the model.

    .venv/bin/python -m benchmarks.calls

One image of the sample bundle with guidance, on ONNX Runtime on the CPU. A first request loads the graphs and is not
counted. A call is one entry into a Python function of latentrt, as `sys.setprofile` reports it; a generator that is
resumed counts each time. The frames are those on the stack of the last step when the denoiser runs, from
`Pipeline.__call__` to `Session.run`, both included.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click

import latentrt
from benchmarks.command import benchmark
from latentrt import Pipeline
from latentrt.backends.session import Session
from latentrt.sampling.loop import step

__all__ = ["Calls", "count_calls"]

PRODUCT = Path(latentrt.__file__).parent
PROMPT = "a large red circle on a blue background"


@dataclass(frozen=True, kw_only=True)
class Calls:
    """Calls of one request.

    Attributes:
        by_file: path of a file relative to the package → the number of calls of its functions.
        elsewhere: the number of calls of Python functions of other packages, mostly numpy's.
        frames: the names of the functions from the call to the model in the last step, outermost first.
    """

    by_file: dict[str, int]
    elsewhere: int
    frames: list[str]


def count_calls(steps: int = 20) -> Calls:
    """Generate an image of the sample bundle twice, and count the calls of the second request."""
    pipeline = Pipeline.load(device="cpu", progress=False)
    by_file, elsewhere, frames = Counter[str](), 0, list[str]()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal elsewhere, frames
        if event != "call":
            return
        path = Path(frame.f_code.co_filename)
        if not path.is_relative_to(PRODUCT):
            elsewhere += 1
            return
        by_file[path.relative_to(PRODUCT).as_posix()] += 1
        if frame.f_code.co_name == "run" and isinstance(frame.f_locals.get("self"), Session):
            frames = _frames_of_step(frame) or frames

    for counted in (False, True):
        sys.setprofile(profile if counted else None)
        try:
            pipeline(PROMPT, seed=7, num_inference_steps=steps)
        finally:
            sys.setprofile(None)
    return Calls(by_file=dict(by_file), elsewhere=elsewhere, frames=frames)


def _frames_of_step(frame: FrameType | None) -> list[str]:
    """Return the names of the frames from the call to a session's `run`; empty outside of a step of the loop."""
    codes = []
    while frame is not None:
        codes.append(frame.f_code)
        if frame.f_code is Pipeline.__call__.__code__:
            return [code.co_qualname for code in reversed(codes)] if step.__code__ in codes else []
        frame = frame.f_back
    return []


@benchmark("benchmarks.calls", __doc__)
@click.option("--steps", type=click.IntRange(1), default=20)
def main(steps: int) -> None:
    calls = count_calls(steps)
    print(f"source files entered: {len(calls.by_file)}")
    for name, number in sorted(calls.by_file.items(), key=lambda item: -item[1]):
        print(f"  {number:>6} {name}")
    print(f"Python calls: {sum(calls.by_file.values())} of latentrt, {calls.elsewhere} of other packages")
    print(f"frames from the call to the model: {len(calls.frames)}")
    for name in calls.frames:
        print(f"  {name}")


if __name__ == "__main__":
    main()

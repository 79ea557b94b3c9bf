"""A peer that takes a millisecond, for `test_peers.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from benchmarks.peer_adapters.protocol import GeneratedImage, Job, Peer, noise, serve


class Fake:
    """Generates one colour. Options: `fail`, `wait_s`, `hold_bytes`, `knows`: a component that only it can time."""

    def __init__(self, job: Job) -> None:
        if "fail" in job.options:
            raise RuntimeError(job.options["fail"])
        self.job, self.held = job, b"x" * job.options.get("hold_bytes", 0)
        time.sleep(job.options.get("wait_s", 0))  # while what it holds is seen
        print("what libraries print is no message")
        assert noise(job)[1] == (1, 4, job.side // 8, job.side // 8)

    def generate(self, step_ended: Callable[[], None]) -> GeneratedImage:
        for _ in range(self.job.steps):
            time.sleep(0.001)
            step_ended()
        pixels = bytes(i % 256 for i in range(self.job.side**2 * 3))
        return GeneratedImage(pixels, {"vae_decoder": 0.5} if "knows" in self.job.options else {})

    def components(self) -> Mapping[str, Callable[[], object]]:
        return {} if "knows" in self.job.options else {"unet": lambda: time.sleep(0.002)}


def load(job: Job) -> Peer:
    """At once."""
    return Fake(job)


if __name__ == "__main__":
    serve(load)

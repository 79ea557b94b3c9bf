"""Runs an adapter in its own process and measures it from outside."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.peer_adapters.protocol import Job
from benchmarks.peer_environments import QUIET, UnavailableError, last_line

__all__ = ["anonymous_bytes", "measure"]

ROOT = Path(__file__).parent.parent
_SAMPLED_S = 0.05


def measure(
    python: Path, module: str, job: Job, *, variables: dict[str, str], folder: Path, timeout_s: float
) -> dict[str, Any]:
    """Return an adapter's measurements, and the peak of its process's anonymous memory while it generated.

    Args:
        python: the Python of its environment.
        module: the adapter.
        variables: the environment variables of its process, in addition to those of every process.
        folder: the working folder of the process, where it keeps compiled code.

    Raises:
        UnavailableError: the process failed or exceeded the time limit.
    """
    command = [str(python), "-P", "-m", module]
    # Override what the caller's environment may set.
    threads = {name: str(job.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "LATENTRT_CACHE": str(folder / "latentrt")}
    environment = {**os.environ, **QUIET, **threads, **caches, "PYTHONPATH": str(ROOT), **variables}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asdict(job) | {"began": time.monotonic()}) + "\n")
            process.stdin.close()
            lines: queue.Queue[str] = queue.Queue()
            reader = threading.Thread(target=_read, args=(process.stdout, lines))
            reader.start()
            try:
                found = _watch(psutil.Process(process.pid), lines, time.monotonic() + timeout_s)
            finally:
                process.kill()
                reader.join()
        log.seek(0)
        if len(found) < 2:
            raise UnavailableError(last_line(log.read()) if found != ["late"] else f"took longer than {timeout_s:g} s")
    images, alone = found
    within = images.pop("components", {})
    return {**images, "components": {**within, **alone["components"]}}


def _watch(process: psutil.Process, lines: queue.Queue[str], deadline: float) -> list[Any]:
    """Return the process's messages, the first with its peak anonymous memory so far; ["late"] past the deadline."""
    messages: list[Any] = []
    largest = 0
    while time.monotonic() < deadline:
        if not messages:
            largest = max(largest, anonymous_bytes(process))
        try:
            line = lines.get(timeout=_SAMPLED_S)
        except queue.Empty:
            continue
        if not line:
            return messages
        messages.append(json.loads(line))
        if len(messages) == 1:
            messages[0]["peak_anonymous_bytes"] = largest
    return ["late"]


def _read(stdout: IO[str], lines: queue.Queue[str]) -> None:
    """Put the lines of a stream into a queue, then an empty line for its end."""
    for line in stdout:
        lines.put(line)
    lines.put("")


def anonymous_bytes(process: psutil.Process) -> int:
    """Return the resident bytes that are neither mapped from a file nor shared; 0 once the process has ended."""
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return int(memory.rss - memory.shared)

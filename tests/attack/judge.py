"""Runs one case of an attack, and judges how it ended: by its errors, the CPU time and the memory that it took."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentrt.errors import LatentRTError

__all__ = ["MOST_BYTES", "MOST_CPU_SECONDS", "attack", "attack_in_test", "cpu_seconds", "usages"]

MOST_CPU_SECONDS = 5.0
MOST_BYTES = 2 << 30
_ALLOWANCE = 3.0
"""So many times the CPU time of a case in a test: two cores may be one core's two threads, which others keep busy."""


def attack(module: Any, case: object, folder: Path, *, allowance: float = 1.0) -> LatentRTError | None:
    """Attack once.

    Args:
        module: the kind of attack.
        case: one of its cases.
        folder: a folder of this kind.
        allowance: times `MOST_CPU_SECONDS` is the most CPU time.

    Returns:
        The error of ours that refused the case; None if nothing bad came of it.

    Raises:
        AssertionError: the attack succeeded, or took too long. Exception: a defect.
    """
    began = cpu_seconds()
    refusal: LatentRTError | None = module.run(case, folder)
    str(refusal)  # which quotes values
    seconds, most = cpu_seconds() - began, allowance * MOST_CPU_SECONDS
    if seconds > most:
        raise AssertionError(f"took {seconds:.1f} s of CPU time, expected at most {most:.0f}")
    return refusal


def attack_in_test(module: Any, case: object, folder: Path) -> LatentRTError | None:
    """Attack once in a process that other tests share: with an allowance, and `MOST_BYTES` beside what it has."""
    with _limited_memory():
        return attack(module, case, folder, allowance=_ALLOWANCE)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Let this process, and the children that it starts, allocate no more than `MOST_BYTES` beside what it has."""
    former, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _allocated_bytes() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (former, hard))


def _allocated_bytes() -> int:
    """Return what the limit counts (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) << 10


def usages() -> tuple[resource.struct_rusage, resource.struct_rusage]:
    """Return what this process and the children that it has waited for used."""
    return resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the children that it has waited for."""
    return sum(each.ru_utime + each.ru_stime for each in usages())

"""Runs one case of an attack, and judges how it ended: by its errors, the CPU time and the memory that it took."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentrt.errors import LatentRTError

__all__ = ["MAX_BYTES", "MAX_CPU_SECONDS", "attack", "attack_in_test", "count_cpu_seconds", "read_usages"]

MAX_CPU_SECONDS = 5.0
MAX_BYTES = 2 << 30
_ALLOWANCE = 3.0
"""The factor of a case's CPU time in a test: two cores may be one core's two threads, which other tests keep busy."""


def attack(module: Any, case: object, folder: Path, *, allowance: float = 1.0) -> LatentRTError | None:
    """Run one case, and check its time.

    Args:
        module: the kind of attack.
        case: one of its cases.
        folder: a folder of this kind.
        allowance: the factor of `MAX_CPU_SECONDS` that gives the most CPU time.

    Returns:
        The error of latentrt that refused the case; None if the case did no harm.

    Raises:
        AssertionError: the attack succeeded, or took too long. Exception: any error that is not latentrt's, a defect.
    """
    began = count_cpu_seconds()
    refusal: LatentRTError | None = module.run(case, folder)
    str(refusal)  # which quotes values
    seconds, most = count_cpu_seconds() - began, allowance * MAX_CPU_SECONDS
    if seconds > most:
        raise AssertionError(f"took {seconds:.1f} s of CPU time, expected at most {most:.0f}")
    return refusal


def attack_in_test(module: Any, case: object, folder: Path) -> LatentRTError | None:
    """Run one case in a process that other tests share.

    The case may take `_ALLOWANCE` times the CPU time, and allocate `MAX_BYTES` more than the process has already.

    Raises:
        AssertionError: as for `attack`. MemoryError: the case needs more memory.
    """
    with _limited_memory():
        return attack(module, case, folder, allowance=_ALLOWANCE)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Limit this process, and the children that it starts, to `MAX_BYTES` more than it has allocated already."""
    former, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _allocated_bytes() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (former, hard))


def _allocated_bytes() -> int:
    """Return what the limit counts (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData:"))
    return int(line.split()[1]) << 10


def read_usages() -> tuple[resource.struct_rusage, resource.struct_rusage]:
    """Return what this process and the children that it has waited for used."""
    return resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)


def count_cpu_seconds() -> float:
    """Return the CPU time of this process and of the children that it has waited for."""
    return sum(each.ru_utime + each.ru_stime for each in read_usages())

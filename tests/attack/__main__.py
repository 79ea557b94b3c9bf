"""Runs every case of every kind of attack, or of the kinds that are named, and prints a table.

    python -m tests.attack --kind values --kind kills --count kills=100

A case fails if it ends in an error that is none of ours, ends its process, takes more than 5 seconds of one core, or
needs more than 2 GB. The exit code is 1 if a case fails. Each kind runs in a process of its own, two at a time. The
cases of a kind are always the same ones in the same order, so the name of a failed case is enough to repeat it.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import Any

from tests.attack.judge import MAX_BYTES, attack, count_cpu_seconds, read_usages

__all__ = ["KINDS", "Tally", "main", "run_kinds"]

KINDS: dict[str, int | None] = {
    "mutations": 1_000_000,
    "kills": 1_000,
    "manifest": None,
    "values": None,
    "cache": None,
    "external_data": None,
    "tokenizers": None,
    "images": None,
    "checkpoints": None,
    "prompts": None,
    "configuration": None,
}
"""Kind → the number of cases of one that has no end. The longest come first, so that both processes end together."""
_MAX_SECONDS = 120
"""A case that takes longer waits for something; one that works ends long before on a core that others use."""
_PROCESSES = 2
_REPORT_SECONDS = 60
_NO_CASES = 3
"""Exit code where a kind's cases cannot be made."""
_SHOWN_FAILURES = 20


class Tally(ctypes.Structure):
    """The outcomes of a kind's cases so far, in memory that the process shares with its parent.

    Attributes:
        ended: the number of cases that ended in any way.
        refused: those that an error of ours ended.
        harmless: those of which nothing bad came.
        failed: those that broke the rule.
        slowest_seconds: the CPU time of the slowest case.
        peak_bytes: the largest memory of the process, or of one that a case started.
        slowest: the name of the slowest case.
        current: the name of the case that runs.
    """

    _fields_ = (
        *((name, ctypes.c_longlong) for name in ("ended", "refused", "harmless", "failed", "peak_bytes")),
        ("slowest_seconds", ctypes.c_double),
        *((name, ctypes.c_char * 80) for name in ("slowest", "current")),
    )


@dataclass
class _Kind:
    """A kind of attack and the process that runs it."""

    name: str
    count: int | None
    tally: Any = field(default_factory=lambda: RawValue(Tally))
    began: float = 0
    process: Any = None

    def start(self, scratch: str) -> None:
        """Start a process at the first case that has not ended."""
        self.began = self.began or time.monotonic()
        self.process = get_context("fork").Process(target=_run_kind, args=(self.name, self.count, self.tally, scratch))
        self.process.start()


def run_kinds(kinds: dict[str, int | None]) -> Iterator[tuple[str, Tally, float]]:
    """Run kinds of attack, two at a time; yield the name, the tally and the seconds of each when it has ended.

    Args:
        kinds: kind → the number of cases; None: all.
    """
    waiting, running = [_Kind(name, count) for name, count in kinds.items()], list[_Kind]()
    with tempfile.TemporaryDirectory(prefix="latentrt-attack-", ignore_cleanup_errors=True) as scratch:
        while waiting or running:
            while waiting and len(running) < _PROCESSES:
                running.append(waiting.pop(0))
                running[-1].start(scratch)
            ended = wait([kind.process.sentinel for kind in running], timeout=_REPORT_SECONDS)
            if not ended:
                so_far = ", ".join(f"{kind.name} {kind.tally.ended:,}, {kind.tally.failed} failed" for kind in running)
                print(f"running: {so_far}", file=sys.stderr)
            for kind in [each for each in running if each.process.sentinel in ended]:
                kind.process.join()
                if kind.process.exitcode:
                    kind.tally.failed += 1
                    case = kind.tally.current.decode("utf-8", "replace")
                    print(f"{kind.name}: {case}: the process ended with {kind.process.exitcode}", flush=True)
                    if kind.process.exitcode != _NO_CASES and kind.tally.failed < _SHOWN_FAILURES:
                        kind.tally.ended += 1
                        kind.start(scratch)  # goes on after the case that ended its process
                        continue
                running.remove(kind)
                yield kind.name, kind.tally, time.monotonic() - kind.began


def _run_kind(name: str, count: int | None, tally: Any, scratch: str) -> None:
    """Run a kind's cases in a process of its own, writing below `scratch`; exit with `_NO_CASES` if it has none."""
    tempfile.tempdir = tempfile.mkdtemp(prefix=f"{name}-", dir=scratch)
    os.environ["LATENTRT_CACHE"] = str(Path(tempfile.tempdir) / "cache")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a case that waits for ever ends its process
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    with os.fdopen(os.dup(1), "w") as report:
        with open(os.devnull, "wb") as nothing:
            for stream in (1, 2):  # what commands print while they are attacked
                os.dup2(nothing.fileno(), stream)

        def show(text: str) -> None:
            print(f"{name}: {text}", file=report, flush=True)

        try:
            _run_cases(importlib.import_module(f"tests.attack.{name}"), count, tally, show)
        except Exception:
            show(traceback.format_exc())
            os._exit(_NO_CASES)


def _run_cases(module: Any, count: int | None, tally: Any, show: Callable[[str], None]) -> None:
    """Run a kind's cases from the first that has not ended; show the first that fail."""
    folder = Path(tempfile.mkdtemp())
    for name, case in itertools.islice(module.cases(), tally.ended, count):
        tally.current, failure, refused, began = _short(name), None, False, count_cpu_seconds()
        signal.alarm(_MAX_SECONDS)
        try:
            refused = attack(module, case, folder) is not None
        except (Exception, SystemExit):
            failure = traceback.format_exc()
        signal.alarm(0)
        seconds = count_cpu_seconds() - began
        if seconds > tally.slowest_seconds:
            tally.slowest_seconds, tally.slowest = seconds, tally.current
        tally.peak_bytes = max(tally.peak_bytes, *(each.ru_maxrss << 10 for each in read_usages()))
        if failure is None:
            tally.refused += refused
            tally.harmless += not refused
        else:
            tally.failed += 1
            if tally.failed <= _SHOWN_FAILURES:
                show(f"{tally.current.decode()}: {failure}")
        tally.ended += 1


def _short(name: str) -> bytes:
    """Return the beginning of a name, printable and in UTF-8."""
    printed = "".join(each if each.isprintable() else "?" for each in name)
    return printed.encode("utf-8", "replace")[:79].decode("utf-8", "ignore").encode()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the kinds, print a line of the table for each when it has ended, and return the exit code."""
    long_kinds = [name for name, count in KINDS.items() if count is not None]
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description="Runs attacks and prints a table.")
    parser.add_argument("--kind", choices=list(KINDS), action="append", help="only this kind; may be repeated")
    parser.add_argument(
        "--count", metavar="KIND=N", action="append", default=[], help=f"of {' or '.join(long_kinds)}: so many cases"
    )
    given = parser.parse_args(arguments)
    counts = dict(KINDS)
    for text in given.count:
        kind, _, number = text.partition("=")
        if kind not in long_kinds or not number.isdecimal():
            parser.error(f"got --count {text}, expected {' or '.join(f'{name}=N' for name in long_kinds)}")
        counts[kind] = int(number)
    chosen = {name: count for name, count in counts.items() if given.kind is None or name in given.kind}
    print("kind              cases  refused harmless failed     peak   time  slowest case, CPU", flush=True)
    failed = 0
    for name, tally, seconds in run_kinds(chosen):
        failed += tally.failed
        print(
            f"{name:<14}{tally.ended:>9,}{tally.refused:>9,}{tally.harmless:>9,}{tally.failed:>7,}"
            f"{tally.peak_bytes >> 20:>5} MiB{seconds:>5.0f} s  {tally.slowest_seconds:.2f} s: "
            f"{tally.slowest.decode('utf-8', 'replace')}",
            flush=True,
        )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

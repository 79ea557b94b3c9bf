"""Processes that are killed at a chosen step: children that share this process's imports and so start at once."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence

__all__ = ["count_steps", "in_child", "start_child"]

# Python reports these before it changes a file system (https://docs.python.org/3/library/audit_events.html), and `open`
# before it opens any file. A process is killed before, and so also right after, each change that it makes.
_STEPS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.utime", "os.truncate", "open"}


def start_child(
    work: Callable[[], object], *, kill_at: int | None = None, by: Sequence[int] = (signal.SIGKILL,)
) -> int:
    """Start a process that does `work` and exits with 0, or with 1 after an exception; return its id.

    Args:
        kill_at: the number of the step, from 0, before which the process is killed; None kills it never.
        by: the signal that it gets, and those that it gets before the steps after that one.
    """
    with warnings.catch_warnings():
        # Other threads of a test process do nothing that the child needs.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        if kill_at is not None:
            _kill_at(kill_at, by)
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def in_child(work: Callable[[], object], *, kill_at: int | None = None, by: Sequence[int] = (signal.SIGKILL,)) -> int:
    """Do `work` in a process of its own, as `start_child` does, and return its exit status; -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(start_child(work, kill_at=kill_at, by=by), 0)[1])


def count_steps(work: Callable[[], object]) -> int:
    """Do `work` in a process of its own, and return the number of steps before which it can be killed."""
    steps, (reading, writing) = 0, os.pipe()

    def count() -> None:
        nonlocal steps
        steps += 1

    def counted() -> None:
        _on_each_step(count)
        try:
            work()
        finally:
            os.write(writing, str(steps).encode())

    in_child(counted)
    os.close(writing)
    with os.fdopen(reading) as counts:
        return int(counts.read())


def _kill_at(step: int, by: Sequence[int]) -> None:
    steps = itertools.count()

    def count() -> None:
        number = next(steps) - step
        if 0 <= number < len(by):
            os.kill(os.getpid(), by[number])

    _on_each_step(count)


def _on_each_step(call: Callable[[], None]) -> None:
    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event in _STEPS:
            call()

    sys.addaudithook(hook)

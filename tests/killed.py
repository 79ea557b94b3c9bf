"""Processes that are killed at a chosen step: children that share this process's imports and so start at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable

__all__ = ["in_child", "start_child"]

# Python reports these before it changes a file system (https://docs.python.org/3/library/audit_events.html), and `open`
# before it opens any file. A process is killed before, and so also right after, each change that it makes.
_STEPS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.utime", "os.truncate", "open"}


def start_child(work: Callable[[], object], *, kill_at: int | None = None) -> int:
    """Start a process that does `work` and exits with 0, or with 1 after an exception; return its id.

    Args:
        kill_at: the number of the step, from 0, before which the process is killed; None kills it never.
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
            _kill_at(kill_at)
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


def in_child(work: Callable[[], object], *, kill_at: int | None = None) -> int:
    """Do `work` in a process of its own, and return its exit status; -9 if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(start_child(work, kill_at=kill_at), 0)[1])


def _kill_at(step: int) -> None:
    left = step

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event in _STEPS:
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)

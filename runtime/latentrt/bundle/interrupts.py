"""Signals that end a command: SIGINT (Ctrl-C), SIGTERM and SIGHUP; on Windows also SIGBREAK (Ctrl-Break).

Each raises an exception in the main thread, so that a command's unfinished files are removed on the way out. Two kinds
of moments are exempt, or the removal itself would be cut short: a signal that arrives in an `uninterrupted` block is
raised at the block's end, and one that arrives while the exception of an earlier signal unwinds the stack is dropped.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["TerminatedError", "ending_on_signals", "ignore_signals", "uninterrupted"]


# Those that this system has.
_NUMBERS: list[int] = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
]


class TerminatedError(SystemExit):
    """Raised by SIGTERM, SIGHUP or SIGBREAK. Not an Exception, so that no command takes it for a failure of its work.

    Attributes:
        signal: the signal that arrived.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class _State:
    """The state that `_handle` and `uninterrupted` share. Only the main thread, where handlers run, writes to it."""

    blocks = 0  # `uninterrupted` blocks that the main thread is in
    waiting: int | None = None  # the first signal that arrived in one


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT, and `TerminatedError` on the other signals of this module, within the block.

    A signal that is ignored (nohup) or has a handler of the application's keeps its disposition.
    """
    replaced: dict[int, Any] = dict.fromkeys(_NUMBERS, signal.SIG_DFL)
    replaced[signal.SIGINT] = signal.default_int_handler
    # Only the main thread may set handlers; a program may call a command from another one.
    if threading.current_thread() is not threading.main_thread():
        replaced = {}
    replaced = {number: usual for number, usual in replaced.items() if signal.getsignal(number) is usual}
    for number in replaced:
        signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, usual in replaced.items():
            if signal.getsignal(number) is _handle:
                signal.signal(number, usual)


def ignore_signals() -> None:
    """Ignore the signals of the `ending_on_signals` block from here on, for a process that is about to exit."""
    for number in _NUMBERS:
        if signal.getsignal(number) is _handle:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let signals of `ending_on_signals` wait until the block's end. For short steps that belong together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _State.blocks += 1
    try:
        yield
    finally:
        _State.blocks -= 1
        if not _State.blocks and (number := _State.waiting) is not None:
            _State.waiting = None
            _handle(number, None)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.blocks:
        _State.waiting = number if _State.waiting is None else _State.waiting
    elif _is_unwinding():
        pass
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise TerminatedError(number)


def _is_unwinding() -> bool:
    """Return whether the main thread is in a `finally` or `except` that runs because of an earlier signal.

    The exception of a signal that was swallowed, as in a `__del__`, does not count, so the next signal is raised.
    """
    error = sys.exception()
    while error is not None:
        if isinstance(error, KeyboardInterrupt | TerminatedError):
            return True
        error = error.__context__
    return False

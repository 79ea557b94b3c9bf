"""How is heavy work done in a process of its own, and what if that process dies?

The parent gives a job as a line of JSON on standard input and reads messages, a line each, from standard output. The
worker ends itself when its parent does. A process of its own bounds memory by the largest piece of work, makes its
peak measurable, and leaves the parent alive to say what happened.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

import msgspec

from latentrt import errors
from latentrt.errors import LatentRTError, MissingExtraError

__all__ = ["Ending", "Failed", "WorkerProcess", "peak_bytes", "take_job", "terminable"]

# What the system says, in the words of whichever library was writing.
_NO_ROOM = ("No space left on device", "File too large", "Disk quota exceeded")
_NO_MEMORY = ("MemoryError", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc")


class Failed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """A worker's message: an error of latentrt, its class in `latentrt.errors` and its sentence. MissingExtraError
    carries its parts."""

    kind: str
    message: str
    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: LatentRTError) -> Failed:
        """The message of an error."""
        parts = error.__reduce__()[1] if isinstance(error, MissingExtraError) else ()
        return cls(kind=type(error).__name__, message=str(error), parts=tuple(map(str, parts)))

    def as_raised(self, otherwise: type[LatentRTError]) -> LatentRTError:
        """The error as it was raised in the worker; of the class `otherwise` where the class is not known here."""
        if self.parts:
            return MissingExtraError(*self.parts)
        error_class: type[LatentRTError] = getattr(errors, self.kind, otherwise)
        return error_class(self.message)


@dataclass(frozen=True)
class Ending:
    """How a worker ended that did not say so: its exit status, and the end of what it wrote to standard error."""

    status: int
    said: str

    @property
    def no_room(self) -> bool:
        """Whether the disk was full."""
        return any(words in self.said for words in _NO_ROOM)

    @property
    def no_memory(self) -> bool:
        """Whether it was killed, most likely for want of memory, or said that it had none left."""
        return self.status == -signal.SIGKILL or any(words in self.said for words in _NO_MEMORY)

    def error(self, name: str, error_class: type[LatentRTError]) -> LatentRTError:
        """An error that tells of it: the last line, which a user needs, and the rest as a note for whoever mends it."""
        ended = f"ended with status {self.status}"
        if self.status < 0:
            ended = f"was ended by {_signal_name(-self.status)}"
        last = self.said.splitlines()[-1] if self.said else "nothing"
        error = error_class(f"{name}: its process {ended} and said: {last}")
        error.add_note(self.said)
        return error


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):  # real-time signals have no names
        return signal.Signals(number).name
    return f"signal {number}"


class WorkerProcess:
    """`python -m module` on one job; leaving the block kills it.

    Args:
        module: calls `take_job`.
        job: what msgspec can write as JSON.
    """

    def __init__(self, module: str, job: msgspec.Struct) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed on leaving the block
        # -P: a file of the user's in the current folder that is called like a package is not that package.
        command = [sys.executable, "-P", "-m", module]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        self._job = job

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def messages(self) -> Iterator[bytes]:
        """The worker's messages, as it sends them; they end when it does."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; `ending` tells what it said of that
            # Left open: its end tells the worker that nobody waits for it any more.
            self._process.stdin.write(msgspec.json.encode(self._job) + b"\n")
            self._process.stdin.flush()
        yield from self._process.stdout

    def ending(self) -> Ending:
        """How it ended, once its messages have."""
        status = self._process.wait()
        self._log.seek(0)
        return Ending(status, self._log.read().decode(errors="replace")[-2000:].strip())


def take_job() -> tuple[bytes, Callable[[msgspec.Struct], None]]:
    """In a worker: its job, and what sends a message to the parent. From here on the process ends with its parent."""
    # Libraries print; the messages have the real standard output to themselves.
    report_to = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def report(message: msgspec.Struct) -> None:
        report_to.write(msgspec.json.encode(message) + b"\n")

    job = sys.stdin.buffer.readline()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    return job, report


def _end_with_parent() -> None:
    """Standard input ends when the parent does, however it does: its work is then nobody's."""
    os.read(0, 1)
    os._exit(1)


def peak_bytes() -> int:
    """The largest resident set of this process.

    Linux hands `ru_maxrss` on from the parent, so that a small worker of a large parent would report the parent's.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Being asked to end unwinds like Ctrl-C, so that what is half made is removed. Who ignores a signal still does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    asked = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in asked:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in asked:
            signal.signal(number, signal.SIG_DFL)

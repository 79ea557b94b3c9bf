"""Runs heavy work in a worker process, and reports how a worker failed.

The parent writes a job as a line of JSON to the worker's standard input and reads messages, one line each, from its
standard output. The worker exits when its parent does. With a process for each piece of work, memory is bounded by the
largest piece, its peak is measurable, and the parent survives to report a crash.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from latentrt import errors
from latentrt.errors import LatentRTError, MissingExtraError, RequestError

__all__ = ["Ending", "Failed", "WorkerProcess", "peak_bytes", "reset_peak", "take_job"]

# Error texts of the system and of libraries; a dead worker leaves nothing else.
_NO_ROOM = ("No space left on device", "File too large", "Disk quota exceeded")
_MAX_SAID = 2000
_SIGKILL = 9  # Windows has neither the signal nor its name
_NO_MEMORY = ("MemoryError", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc")


class Failed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """A worker's message that it failed with an error of latentrt.

    Attributes:
        kind: the error's class in `latentrt.errors`.
        message: its text.
        parts: the arguments of a MissingExtraError; () for other classes.
    """

    kind: str
    message: str
    parts: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: LatentRTError) -> Failed:
        """Return the message for an error."""
        parts = error.__reduce__()[1] if isinstance(error, MissingExtraError) else ()
        # A message cannot hold half a surrogate pair, which the name of a file may have.
        message = str(error).encode("utf-8", "backslashreplace").decode()
        return cls(kind=type(error).__name__, message=message, parts=tuple(map(str, parts)))

    def as_raised(self, otherwise: type[LatentRTError]) -> LatentRTError:
        """Return the error as raised in the worker; of the class `otherwise` where its class is unknown here."""
        if self.parts:
            return MissingExtraError(*self.parts)
        error_class: type[LatentRTError] = getattr(errors, self.kind, otherwise)
        return error_class(self.message)


@dataclass(frozen=True)
class Ending:
    """The end of a worker that sent no final message.

    Attributes:
        status: its exit status; −N if signal N ended it.
        said: the end of its standard error, at most `_MAX_SAID` characters.
    """

    status: int
    said: str

    @property
    def no_room(self) -> bool:
        """True if the worker failed because the disk or a quota was full."""
        return any(words in self.said for words in _NO_ROOM)

    @property
    def no_memory(self) -> bool:
        """True if memory ran out: the worker said so, or SIGKILL ended it, most likely by the out-of-memory killer."""
        return self.status == -_SIGKILL or any(words in self.said for words in _NO_MEMORY)

    def error(self, name: str, error_class: type[LatentRTError]) -> LatentRTError:
        """Return an error with the last line of the worker's output; all of it is a note, for a bug report.

        Args:
            name: of the work, which begins the message.
        """
        ended = f"ended with status {self.status}"
        if self.status < 0:
            ended = f"was ended by {_signal_name(-self.status)}"
        elif self.status >= _FIRST_FAULT:
            ended = f"ended with status {self.status:#x}"
        last = self.said.splitlines()[-1] if self.said else "nothing"
        error = error_class(f"{name}: its process {ended}; last output: {last}")
        error.add_note(self.said)
        return error


_FIRST_FAULT = 0x80000000  # Windows' codes for a crash, which its documentation lists in hexadecimal


def _signal_name(number: int) -> str:
    with contextlib.suppress(ValueError):  # real-time signals have no names
        return signal.Signals(number).name
    return f"signal {number}"


class WorkerProcess:
    """A worker process, `python -m module`, for one job. It is killed on leaving the `with` block.

    Args:
        module: name of a module that calls `take_job`.
        job: sent to the worker as JSON.

    Raises:
        RequestError: a text of the job is not valid Unicode.
    """

    def __init__(self, module: str, job: msgspec.Struct) -> None:
        try:
            self._job = msgspec.json.encode(job)
        except UnicodeEncodeError:  # half a surrogate pair: Python's form of a file name that is no UTF-8
            raise RequestError(
                "got a path or a text that is not valid Unicode, expected valid Unicode; rename the file or its folder"
            ) from None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed on leaving the block
        # -P: do not import modules from the current folder, where a file may have the name of a package.
        command = [sys.executable, "-P", "-m", module]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def messages(self) -> Iterator[bytes]:
        """Yield the worker's messages, one line each, as it sends them, until it ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once; `ending` has the reason
            # Left open: the worker exits when the pipe is closed.
            self._process.stdin.write(self._job + b"\n")
            self._process.stdin.flush()
        yield from self._process.stdout

    def ending(self) -> Ending:
        """Wait for the worker to end and return its status and last output. Call it after `messages`."""
        status = self._process.wait()
        # A library may have written any amount. A character of UTF-8 has at most four bytes.
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4 * _MAX_SAID))
        return Ending(status, self._log.read(4 * _MAX_SAID).decode(errors="replace")[-_MAX_SAID:].strip())


def take_job() -> tuple[bytes, Callable[[msgspec.Struct], None]]:
    """Return this worker's job and a function that sends a message to the parent.

    From here on the process exits when its parent does, and `print` writes to standard error.

    Returns:
        The job as JSON, and the function.
    """
    # Libraries print to standard output, so messages use a duplicate of it and the original becomes standard error.
    report_to = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def report(message: msgspec.Struct) -> None:
        report_to.write(msgspec.json.encode(message) + b"\n")

    _be_killed_with_parent()
    job = sys.stdin.buffer.readline()
    # The pipe from the parent gets another number, and standard input is empty: on Windows, whoever asks for the kind
    # of a pipe waits for a read of it to end, and libraries ask for that of standard input when they are loaded.
    from_parent, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_end_with_parent, args=(from_parent,), daemon=True).start()
    return job, report


_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _be_killed_with_parent() -> None:
    """Have Linux kill this process when its parent ends, even in a library's long call that holds Python's lock.

    A parent that has ended already has closed standard input, so that there is no job to take.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)


def _end_with_parent(pipe: int) -> None:
    """Exit when the pipe from the parent is closed, which happens whenever and however the parent ends."""
    os.read(pipe, 1)
    os._exit(1)


def reset_peak() -> None:
    """Make `peak_bytes` count from the memory that this process has now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_bytes(b"5")


def peak_bytes() -> int:
    """Return the largest resident set of this process, in bytes; 0 where nothing tells it (Windows without psutil).

    On Linux it is read from /proc: `ru_maxrss` is inherited from the parent, and a small worker of a large parent would
    report the parent's.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_bytes().splitlines():
            if line.startswith(b"VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        with contextlib.suppress(ImportError):
            import psutil

            return int(psutil.Process().memory_info().peak_wset)
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

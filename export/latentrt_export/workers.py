"""How is a submodule exported in a process of its own, and what if that process dies?"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from latentrt import errors
from latentrt.errors import ExportError, LatentRTError, MissingExtraError, OutputError
from latentrt_export.worker import Done, Failed, Job, Message, Phase

__all__ = ["run_worker"]

# What the system says, in the words of whichever library was writing.
_NO_ROOM = ("No space left on device", "File too large", "Disk quota exceeded")
_NO_MEMORY = ("MemoryError", "can't allocate memory", "Cannot allocate memory", "std::bad_alloc")


def run_worker(job: Job, on_phase: Callable[[str], None]) -> Done:
    """Export one submodule in a fresh interpreter and wait for it.

    Args:
        job: what to export.
        on_phase: told what the worker is doing, as it says so.

    Raises:
        LatentRTError: the worker's own error, as it was raised there.
        OutputError: there was no room for its files.
        ExportError: the worker died without an error of its own: killed for want of memory, or a defect.
    """
    # -P: a file of the user's in the current folder that is called like a package is not that package.
    command = [sys.executable, "-P", "-m", "latentrt_export.worker"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)
        try:
            return _converse(process, job, on_phase, log)
        finally:
            process.kill()
            process.communicate()


def _converse(process: subprocess.Popen[bytes], job: Job, on_phase: Callable[[str], None], log: IO[bytes]) -> Done:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; what it said of that is told below
        # Left open: its end tells the worker that nobody waits for it any more.
        process.stdin.write(msgspec.json.encode(job) + b"\n")
        process.stdin.flush()
    for line in process.stdout:
        message = msgspec.json.decode(line, type=Message)
        match message:
            case Phase(text):
                on_phase(text)
            case Done():
                return message
            case Failed():
                raise _as_raised(message)
    raise _died(job, process.wait(), log)


def _as_raised(failed: Failed) -> LatentRTError:
    if failed.parts:
        return MissingExtraError(*failed.parts)
    error_class: type[LatentRTError] = getattr(errors, failed.kind, ExportError)
    return error_class(failed.message)


def _died(job: Job, status: int, log: IO[bytes]) -> LatentRTError:
    log.seek(0)
    tail = log.read().decode(errors="replace")[-2000:].strip()
    if any(words in tail for words in _NO_ROOM):
        where = Path(job.folder).parent.parent.parent
        return OutputError(f"{job.submodule}: its files cannot be written, there is no room for them in {where}")
    if status == -signal.SIGKILL or any(words in tail for words in _NO_MEMORY):
        return ExportError(
            f"{job.submodule}: its process was killed, most likely for want of memory. "
            "Close other programs, or export on a machine with more"
        )
    ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    # The whole of it is below, for whoever mends it; a user needs the last line.
    error = ExportError(
        f"{job.submodule}: its process {ended} and said: {tail.splitlines()[-1] if tail else 'nothing'}"
    )
    error.add_note(tail)
    return error

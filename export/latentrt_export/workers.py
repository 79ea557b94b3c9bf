"""How is a submodule exported in a process of its own, and what if that process dies?"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from latentrt import errors
from latentrt.errors import ExportError, LatentRTError, MissingExtraError
from latentrt_export.worker import Done, Failed, Job, Message, Phase

__all__ = ["run_worker"]


def run_worker(job: Job, on_phase: Callable[[str], None]) -> Done:
    """Export one submodule in a fresh interpreter and wait for it.

    Args:
        job: what to export.
        on_phase: told what the worker is doing, as it says so.

    Raises:
        LatentRTError: the worker's own error, as it was raised there.
        ExportError: the worker died without one: killed for want of memory, or a defect.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "latentrt_export.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
        )
        try:
            return _converse(process, job, on_phase, log)
        finally:
            process.kill()
            process.wait()


def _converse(process: subprocess.Popen[bytes], job: Job, on_phase: Callable[[str], None], log: IO[bytes]) -> Done:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(msgspec.json.encode(job))
    process.stdin.close()
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


def _died(job: Job, status: int, log: IO[bytes]) -> ExportError:
    log.seek(0)
    tail = log.read().decode(errors="replace")[-2000:].strip()
    if status == -9:
        return ExportError(
            f"{job.submodule}: its process was killed, most likely for want of memory. Close other programs, or export on a machine with more"
        )
    if "No space left on device" in tail:
        return ExportError(f"{job.submodule}: the disk is full ({Path(job.folder).parent}); free some space and export again")
    return ExportError(f"{job.submodule}: its process ended with status {status} and said:\n{tail}")

"""What is made of a submodule's process: its phases, its result, its error, its death."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from latentrt.errors import ExportError, LatentRTError, OutputError
from latentrt.worker_process import Ending, Failed, WorkerProcess
from latentrt_export.worker import Done, Job, Message, Phase

__all__ = ["run_worker"]


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
    with WorkerProcess("latentrt_export.worker", job) as worker:
        for line in worker.messages():
            message = msgspec.json.decode(line, type=Message)
            match message:
                case Phase(text):
                    on_phase(text)
                case Done():
                    return message
                case Failed():
                    raise message.as_raised(ExportError)
        raise _died(job, worker.ending())


def _died(job: Job, ending: Ending) -> LatentRTError:
    if ending.no_room:
        where = Path(job.folder).parent.parent.parent
        return OutputError(f"{job.submodule}: its files cannot be written, there is no room for them in {where}")
    if ending.no_memory:
        return ExportError(
            f"{job.submodule}: its process was killed, most likely for want of memory. "
            "Close other programs, or export on a machine with more"
        )
    return ending.error(job.submodule, ExportError)

"""One submodule becomes graphs, in a process of its own, so that memory is bounded by the largest submodule.

The parent gives a `Job` as a line of JSON on standard input and reads `Phase` lines, then one `Done` or `Failed`, from
standard output. Arrays travel as an .npz file that each worker reads and adds to. A worker whose parent is gone ends
itself. Run as `python -m latentrt_export.worker`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import resource
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentrt.errors import LatentRTError, MissingExtraError
from latentrt.manifest import Component, Precision

__all__ = ["SUBMODULES", "Done", "Failed", "Job", "Message", "Phase"]

# name in the bundle → (module and class of the traceable submodule, folder in the checkpoint), in the order of export:
# what an earlier one makes of its inputs is what a later one is judged on.
SUBMODULES = {
    "text_encoder": ("text_encoder:TextEncoder", "text_encoder"),
    "vae_encoder": ("vae:VaeEncoder", "vae"),
    "vae_decoder": ("vae:VaeDecoder", "vae"),
    "unet": ("unet:UNet", "unet"),
    "safety_checker": ("safety_checker:SafetyChecker", "safety_checker"),
}


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to export: a submodule of a checkpoint, into a folder of the bundle that is being made."""

    submodule: str
    checkpoint: str
    variant: str | None
    precision: Precision
    folder: str
    known: str
    prefix: str


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """What the worker is doing now."""

    text: str


class Done(msgspec.Struct, frozen=True, tag="done", kw_only=True):
    """The component as the manifest will have it, and what else the manifest should know."""

    component: Component
    facts: dict[str, Any]


class Failed(msgspec.Struct, frozen=True, tag="failed", kw_only=True):
    """An error of latentrt: its class in `latentrt.errors`, and its sentence. MissingExtraError carries its parts."""

    kind: str
    message: str
    parts: tuple[str, ...] = ()


Message = Phase | Done | Failed


def main() -> None:
    """Read the job, do it, report. Errors that are not ours leave a traceback on standard error and exit code 1."""
    # Libraries print; the report has the real standard output to itself.
    report_to = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)

    def report(message: Message) -> None:
        report_to.write(msgspec.json.encode(message) + b"\n")

    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=Job)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    started = time.monotonic()
    try:
        component, facts = _export(job, lambda text: report(Phase(text)))
    except LatentRTError as error:
        parts = error.__reduce__()[1] if isinstance(error, MissingExtraError) else ()
        report(Failed(kind=type(error).__name__, message=str(error), parts=tuple(map(str, parts))))
        return
    seconds = round(time.monotonic() - started, 3)
    component = msgspec.structs.replace(component, export_peak_bytes=_peak_bytes(), export_seconds=seconds)
    report(Done(component=component, facts=facts))


def _end_with_parent() -> None:
    """Standard input ends when the parent does, however it does: its work is then nobody's."""
    os.read(0, 1)
    os._exit(1)


def _peak_bytes() -> int:
    """The largest resident set of this process.

    Linux hands `ru_maxrss` on from the parent, so that a small worker of a large parent would report the parent's.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _export(job: Job, phase: Callable[[str], None]) -> tuple[Component, dict[str, Any]]:
    phase("loading weights")
    try:
        submodule_class, export_component = _heavy_imports(job.submodule)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export", "export a checkpoint") from error
    submodule = submodule_class.load(Path(job.checkpoint), job.variant)
    with np.load(job.known) as stored:
        known = dict(stored)
    facts = submodule.facts()
    component, learnt = export_component(submodule, Path(job.folder), job.prefix, job.precision, known, phase)
    np.savez(job.known, **{**known, **learnt})
    return component, facts


def _heavy_imports(submodule: str) -> tuple[Any, Any]:
    from latentrt_export.component import export_component

    module, name = SUBMODULES[submodule][0].split(":")
    return getattr(importlib.import_module(f"latentrt_export.{module}"), name), export_component


if __name__ == "__main__":
    main()

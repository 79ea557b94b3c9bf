"""One submodule becomes graphs, in a process of its own, so that memory is bounded by the largest submodule.

The parent gives a `Job` as JSON on standard input and reads `Phase` lines, then one `Done` or `Failed`, from standard output. Arrays
travel as an .npz file that each worker reads and adds to. Run as `python -m latentrt_export.worker`.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentrt.errors import LatentRTError
from latentrt.manifest import Component, Precision

__all__ = ["SUBMODULES", "Done", "Failed", "Job", "Message", "Phase"]

# name in the bundle → (module and class of the traceable submodule, folder in the checkpoint), in the order of export: what an earlier
# one makes of its inputs is what a later one is judged on.
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

    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    started = time.monotonic()
    try:
        component, facts = _export(job, lambda text: report(Phase(text)))
    except LatentRTError as error:
        parts = error.__reduce__()[1] if type(error).__name__ == "MissingExtraError" else ()
        report(Failed(kind=type(error).__name__, message=str(error), parts=tuple(map(str, parts))))
        return
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    component = msgspec.structs.replace(component, export_peak_bytes=peak, export_seconds=round(time.monotonic() - started, 3))
    report(Done(component=component, facts=facts))


def _export(job: Job, phase: Callable[[str], None]) -> tuple[Component, dict[str, Any]]:
    import importlib

    from latentrt_export.component import export_component

    phase("loading weights")
    module, name = SUBMODULES[job.submodule][0].split(":")
    submodule_class = getattr(importlib.import_module(f"latentrt_export.{module}"), name)
    submodule = submodule_class.load(Path(job.checkpoint), job.variant)
    with np.load(job.known) as stored:
        known = dict(stored)
    facts = submodule.facts()
    component, learnt = export_component(submodule, Path(job.folder), job.prefix, job.precision, known, phase)
    np.savez(job.known, **{**known, **learnt})
    return component, facts


if __name__ == "__main__":
    main()

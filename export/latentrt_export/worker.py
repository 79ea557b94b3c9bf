"""One submodule becomes graphs, in a process of its own, so that memory is bounded by the largest submodule.

The parent gives a `Job` and reads `Phase` messages, then one `Done` or `Failed` (`latentrt.worker_process`). Arrays
travel as an .npz file that each worker reads and adds to. Run as `python -m latentrt_export.worker`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentrt.bundle.manifest import Component, Precision
from latentrt.errors import LatentRTError, MissingExtraError
from latentrt.worker_process import Failed, peak_bytes, take_job
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["SUBMODULES", "Division", "Done", "Job", "Message", "Phase"]

# name in the bundle → (module and class of the traceable submodule, folder in the checkpoint), in the order of export:
# what an earlier one makes of its inputs is what a later one is judged on, and calibrated.
SUBMODULES = {
    "text_encoder": ("modules.text_encoder:TextEncoder", "text_encoder"),
    "vae_encoder": ("modules.vae:VaeEncoder", "vae"),
    "unet": ("modules.unet:UNet", "unet"),
    "vae_decoder": ("modules.vae:VaeDecoder", "vae"),
    "preview_decoder": ("modules.preview_decoder:PreviewDecoder", "preview_decoder"),
    "safety_checker": ("modules.safety_checker:SafetyChecker", "safety_checker"),
}


class Division(msgspec.Struct, frozen=True, kw_only=True):
    """That there are to be parts: of the decoder, for slices; of the denoiser, with `deep_cache` the branch of its part
    `shallow`, None for no such part."""

    deep_cache: int | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to export: a submodule of a checkpoint, into a folder of the bundle that is being made.

    `division` is for those that can have parts; None leaves them whole. `token_merging` is the ratio for one whose
    self-attention merges; None merges nothing. `quantizing` is for int8.
    """

    submodule: str
    checkpoint: str
    variant: str | None
    precision: Precision
    folder: str
    known: str
    prefix: str
    division: Division | None = None
    token_merging: float | None = None
    quantizing: QuantizationOptions | None = None


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """What the worker is doing now."""

    text: str


class Done(msgspec.Struct, frozen=True, tag="done", kw_only=True):
    """The component as the manifest will have it, and what else the manifest should know."""

    component: Component
    facts: dict[str, Any]


Message = Phase | Done | Failed


def main() -> None:
    """Read the job, do it, report. Errors that are not ours leave a traceback on standard error and exit code 1."""
    line, report = take_job()
    job = msgspec.json.decode(line, type=Job)
    started = time.monotonic()
    try:
        component, facts = _export(job, lambda text: report(Phase(text)))
    except LatentRTError as error:
        report(Failed.of(error))
        return
    seconds = round(time.monotonic() - started, 3)
    component = msgspec.structs.replace(component, export_peak_bytes=peak_bytes(), export_seconds=seconds)
    report(Done(component=component, facts=facts))


def _export(job: Job, phase: Callable[[str], None]) -> tuple[Component, dict[str, Any]]:
    phase("loading weights")
    try:
        submodule_class, export_component = _heavy_imports(job.submodule)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export", "export a checkpoint") from error
    submodule = submodule_class.load(Path(job.checkpoint), job.variant)
    with np.load(job.known) as stored:
        known = dict(stored)
    merging = submodule.merge_tokens(job.token_merging) if job.token_merging is not None else None
    facts = submodule.facts()
    parts = _parts_maker(job, job.division, submodule, phase) if job.division else None
    component, learnt = export_component(
        submodule, Path(job.folder), job.prefix, job.precision, known, phase, parts, job.quantizing
    )
    np.savez(job.known, **{**known, **learnt})
    return msgspec.structs.replace(component, token_merging=merging), facts


def _parts_maker(job: Job, division: Division, submodule: Any, phase: Callable[[str], None]) -> Any:
    """What makes a submodule's parts, if it is of a kind that has any."""
    from latentrt_export.graphs.slices import SliceWriter
    from latentrt_export.graphs.split import SplitWriter

    folder, alone = Path(job.folder), submodule.alone
    if submodule.sliced:
        return SliceWriter(inputs=submodule.inputs, folder=folder, prefix=job.prefix, phase=phase)
    if not alone:
        return None
    return SplitWriter(
        loop_invariant_inputs=alone, deep_cache=division.deep_cache, folder=folder, prefix=job.prefix, phase=phase
    )


def _heavy_imports(submodule: str) -> tuple[Any, Any]:
    from latentrt_export.component import export_component

    module, name = SUBMODULES[submodule][0].split(":")
    return getattr(importlib.import_module(f"latentrt_export.{module}"), name), export_component


if __name__ == "__main__":
    main()

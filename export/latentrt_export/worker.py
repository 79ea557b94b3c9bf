"""Exports components in a process of their own, which may be killed for lack of memory without the parent.

The parent sends `Jobs`, and reads `Phase` messages and one `Done` for each component in turn, or one `Failed`
(`latentrt.worker_process`). One process serves all components, because torch and its libraries take seconds to import.
The arrays behind gate inputs are passed as an .npz file that each job reads and extends. Run as
`python -m latentrt_export.worker`; the parent's side is `run_jobs`.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from latentrt.bundle.export_report import ComponentCost
from latentrt.bundle.graph_check import check_graph, find_graphs
from latentrt.bundle.graph_ranges import Range
from latentrt.bundle.manifest import Component, LatentSpace, Precision
from latentrt.errors import ExportError, GraphError, LatentRTError, MissingExtraError, OutputError
from latentrt.worker_process import Ending, Failed, WorkerProcess, peak_bytes, reset_peak, take_job
from latentrt_export.export_warning import relay_warnings
from latentrt_export.families.plan import ComponentPlan
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["Done", "Job", "Jobs", "Message", "Phase", "SplitOptions", "Warned", "run_job", "run_jobs"]

_EXTEND_CHECK = "No bundle was written; an operator that is new needs a rule in latentrt.bundle.graph_shapes"


class SplitOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of splitting components into parts: decoders into slices, denoisers by how often values change.

    Attributes:
        deep_cache: the branch at which a denoiser's `shallow_body` is split off; None omits that part.
    """

    deep_cache: int | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The export of one component.

    Attributes:
        component: the component's plan.
        checkpoint, variant: the folder and the variant of its weights.
        precision: the precision of the bundle.
        folder: the folder for its files.
        gate_inputs: the .npz file with the arrays behind gate inputs (`latentrt.bundle.gate_inputs`).
        latent_space: the latent space of the model.
        split: the options of splitting a denoiser or decoder into parts; None leaves it whole.
        token_merging: the share of tokens to merge in self-attention; None merges none.
        quantization: the options of int8.
        ranges: the range of the whole numbers from each source (`latentrt.bundle.graph_check.find_ranges`).
    """

    component: ComponentPlan
    checkpoint: str
    variant: str | None
    precision: Precision
    folder: str
    gate_inputs: str
    latent_space: LatentSpace
    split: SplitOptions | None = None
    token_merging: float | None = None
    quantization: QuantizationOptions | None = None
    ranges: dict[str, Range]


class Jobs(msgspec.Struct, frozen=True):
    """The jobs of a worker, in their order."""

    jobs: tuple[Job, ...]


class Phase(msgspec.Struct, frozen=True, tag="phase"):
    """A description of the step that the worker begins."""

    text: str


class Warned(msgspec.Struct, frozen=True, tag="warned"):
    """A warning, which does not stop the export."""

    text: str


class Done(msgspec.Struct, frozen=True, tag="done", kw_only=True):
    """The component's record for the manifest, and the cost of its export."""

    component: Component
    cost: ComponentCost


Message = Phase | Warned | Done | Failed
_MESSAGES: msgspec.json.Decoder[Message] = msgspec.json.Decoder(Message)
_JOBS = msgspec.json.Decoder(Jobs)


def run_jobs(
    jobs: Sequence[Job], notify: Callable[[str, str], None], warn: Callable[[str], None]
) -> Generator[Done, None, None]:
    """Export components in a fresh interpreter, and yield each result when it is there.

    Args:
        jobs: the components to export, in this order.
        notify: called with the name of the component and a description of each step that begins.
        warn: called with each warning.

    Raises:
        LatentRTError: the error that the worker raised.
        OutputError: the disk is full.
        ExportError: the worker ended without an error: it was killed for lack of memory, or has a defect.
    """
    waiting = [*jobs]
    with WorkerProcess("latentrt_export.worker", Jobs(tuple(jobs))) as worker:
        for line in worker.messages():
            match _MESSAGES.decode(line):
                case Phase(text):
                    notify(waiting[0].component.name, text)
                case Warned(text):
                    warn(text)
                case Done() as done:
                    yield done
                    del waiting[0]
                    if not waiting:
                        return
                case Failed() as failed:
                    raise failed.as_raised(ExportError)
        raise _explain_death(waiting[0], worker.ending())


def _explain_death(job: Job, ending: Ending) -> LatentRTError:
    name = job.component.name
    if ending.no_room:
        where = Path(job.folder).parent.parent.parent
        return OutputError(f"{name}: its files cannot be written: no space left in {where}; make room and export again")
    if ending.no_memory:
        return ExportError(
            f"{name}: its process was killed, most likely for lack of memory. "
            "Close other programs, or export on a machine with more memory"
        )
    return ending.error(name, ExportError)


def main() -> None:
    """Read the jobs from standard input, run them, and report the results.

    Errors other than `LatentRTError` leave a traceback on standard error and the exit code 1.
    """
    line, report = take_job()
    for job in _JOBS.decode(line).jobs:
        started = time.monotonic()
        reset_peak()
        try:
            with relay_warnings(lambda text: report(Warned(text))):
                component = run_job(job, lambda text: report(Phase(text)))
        except LatentRTError as error:
            report(Failed.of(error))
            return
        cost = ComponentCost(seconds=round(time.monotonic() - started, 3), peak_bytes=peak_bytes())
        report(Done(component=component, cost=cost))


def run_job(job: Job, notify: Callable[[str], None]) -> Component:
    """Run a job in this process: export one component.

    Args:
        job, notify: as those of `run_jobs`.

    Raises:
        LatentRTError: the component cannot be exported.

    Warns:
        ExportWarning: the checkpoint has a fault that does not stop the export.
    """
    notify("loading weights")
    try:
        from latentrt_export.component import export_component

        module_name, class_name = job.component.module.split(":")
        module_class = getattr(importlib.import_module(f"latentrt_export.modules.{module_name}"), class_name)
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export", "export a checkpoint") from error
    module = module_class.load(Path(job.checkpoint), job.variant)
    with np.load(job.gate_inputs) as stored:
        arrays = dict(stored)
    merging = module.merge_tokens(job.token_merging) if job.token_merging is not None else None
    component, produced = export_component(
        module,
        job.component,
        Path(job.folder),
        job.precision,
        arrays,
        job.latent_space,
        notify,
        parts=_make_part_writer(job, job.split, module, notify) if job.split is not None else None,
        quantization=job.quantization,
    )
    _check_graphs(component, Path(job.folder), job.ranges)
    np.savez(job.gate_inputs, **{**arrays, **produced})
    return msgspec.structs.replace(component, token_merging=merging)


def _check_graphs(component: Component, folder: Path, ranges: Mapping[str, Range]) -> None:
    """Check each graph as the runtime does before it hands one to a backend.

    Raises:
        ExportError: the runtime would refuse a graph.
    """
    weights_bytes = (folder / Path(component.weights.file).name).stat().st_size
    for graph in find_graphs(component, weights_bytes, ranges):
        try:
            check_graph((folder / Path(graph.file).name).read_bytes(), graph, remedy=_EXTEND_CHECK)
        except GraphError as error:
            raise ExportError(f"the runtime would refuse the exported graph: {error}") from error


def _make_part_writer(job: Job, split: SplitOptions, module: Any, notify: Callable[[str], None]) -> Any:
    """Return the writer that splits a component's graphs; None for components that are not split."""
    from latentrt_export.graphs.slices import SliceWriter
    from latentrt_export.graphs.split import SplitWriter

    common: dict[str, Any] = {"component": job.component.name, "folder": Path(job.folder), "notify": notify}
    if module.is_sliced:
        return SliceWriter(inputs=module.inputs, outputs=module.outputs, **common)
    if not module.loop_invariant_inputs:
        return None
    return SplitWriter(
        loop_invariant_inputs=module.loop_invariant_inputs,
        deep_cache=split.deep_cache,
        required=split.deep_cache is not None,
        **common,
    )


if __name__ == "__main__":
    main()

"""Writes the files of a bundle: tokenizer, documents, components and, last, the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentrt import __version__
from latentrt.bundle.digests import ByteProgress, file_record
from latentrt.bundle.export_report import ComponentCost, ExportReport, write_report
from latentrt.bundle.gate_inputs import PROMPTS, tokenize_prompts
from latentrt.bundle.graph_check import find_ranges
from latentrt.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Component,
    Licence,
    Manifest,
    Precision,
    SchedulerRecord,
    Source,
    TokenizerRecord,
    encode_manifest,
)
from latentrt.bundle.renames import replace_file
from latentrt.bundle.staging import Stage
from latentrt.errors import CheckpointError, RequestError
from latentrt.sampling.samplers import check_suits, find
from latentrt.sampling.training_noise import select_training_config, training_alphas
from latentrt.text.tokenizer import Tokenizer
from latentrt_export.checkpoints.checkpoint import Checkpoint
from latentrt_export.checkpoints.checkpoint_files import read_small_file
from latentrt_export.checkpoints.tokenizer import export_tokenizer
from latentrt_export.checkpoints.weights import check_values
from latentrt_export.export_warning import warn
from latentrt_export.families.plan import ExportPlan
from latentrt_export.quantize.options import QuantizationOptions
from latentrt_export.worker import Done, Job, SplitOptions, run_worker

__all__ = ["Progress", "write_bundle"]


_MAX_DOCUMENT_BYTES = 16 << 20


class Progress(Protocol):
    """A receiver of an export's progress."""

    def phase(self, component: str, text: str) -> None:
        """Report the step that a component begins."""

    def done(self, component: str, record: Component, cost: ComponentCost) -> None:
        """Report that a component is finished, with its record and cost."""

    def warn(self, text: str) -> None:
        """Report a warning, which does not stop the export."""

    def download(self, title: str, size: int) -> AbstractContextManager[ByteProgress]:
        """Report a download of so many bytes within the block, which calls the result with the bytes that came."""


def write_bundle(
    checkpoint: Checkpoint,
    plan: ExportPlan,
    stage: Stage,
    *,
    precision: Precision,
    split: SplitOptions | None,
    token_merging: float | None,
    quantization: QuantizationOptions | None,
    progress: Progress,
) -> Manifest:
    """Export every component and write the bundle's files, the manifest last.

    Args:
        checkpoint: the checkpoint to export.
        plan: the plan of its export.
        stage: the folders to write to; the arrays that components pass to later ones are in its scratch folder.
        precision: the precision of the weights, and of the arithmetic on a GPU.
        split: the options of splitting components into parts; None for no parts.
        token_merging: the share of tokens to merge in the denoiser's self-attention; None merges none.
        quantization: the options of int8, if the precision is int8.
        progress: notified of steps and results.

    Raises:
        CheckpointError, ExportError: the checkpoint cannot be exported.
        OSError: the bundle cannot be written.

    Warns:
        ExportWarning: of the plan, of conditions that will keep the bundle from running, and as a component's worker
            did.
    """
    for name, weights in checkpoint.weights.items():
        check_values(name, weights)
    scheduler = SchedulerRecord.of(checkpoint.scheduler_class, plan.scheduler_config, plan.scheduler_changes)
    _warn_about_runs(scheduler, plan)
    tokenizers = {
        encoder: export_tokenizer(checkpoint.folder, folder, encoder, stage.bundle, stage.scratch)
        for encoder, folder in plan.tokenizers.items()
    }
    _check_lengths(plan, tokenizers)
    licence = _copy_documents(checkpoint, stage.bundle)
    gate_inputs = _write_first_arrays(plan, stage, tokenizers, quantization)
    results: dict[str, Done] = {}
    for component in plan.components:
        weights = checkpoint.weights[component.weights]
        job = Job(
            component=component,
            checkpoint=str(weights.root.absolute()),
            variant=weights.variant,
            precision=precision,
            folder=str(stage.bundle / component.name),
            gate_inputs=str(gate_inputs),
            latent_space=next(iter(plan.latent_spaces.values())),
            split=split,
            token_merging=token_merging,
            quantization=quantization,
            ranges=find_ranges(plan.limits, tokenizers.get(component.name)),
        )
        done = run_worker(
            job,
            lambda text, name=component.name: progress.phase(name, text),  # type: ignore[misc]
            warn,
        )
        results[component.name] = done
        if precision == "int8" and component.role == "denoiser" and "int8" not in done.component.graphs:
            warn(f"{component.name}: such a denoiser is not quantised, its weights are float16")
        progress.done(component.name, done.component, done.cost)
    files = sorted(path.relative_to(stage.bundle).as_posix() for path in stage.bundle.rglob("*") if path.is_file())
    others = {
        name: SchedulerRecord.of(each.class_name, each.config) for name, each in checkpoint.other_schedulers.items()
    }
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        created_by=f"latentrt {__version__}",
        family=plan.family,
        tasks=plan.tasks,
        source=Source(
            name=checkpoint.name,
            layout=checkpoint.layout,
            weights={name: source.hash() for name, source in checkpoint.sources.items()},
            repository=checkpoint.origin and checkpoint.origin[0],
            revision=checkpoint.origin and checkpoint.origin[1],
        ),
        licence=licence,
        precision=precision,
        components={name: done.component for name, done in results.items()},
        tokenizers=tokenizers,
        schedulers={**dict.fromkeys(plan.latent_spaces, scheduler), **others},
        latent_spaces=dict(plan.latent_spaces),
        defaults=plan.defaults,
        limits=plan.limits,
        files={name: file_record(stage.bundle / name) for name in files},
    )
    write_report(stage.bundle, ExportReport(components={name: done.cost for name, done in results.items()}))
    _write_last(stage.bundle / MANIFEST_NAME, encode_manifest(manifest))
    return manifest


def _warn_about_runs(scheduler: SchedulerRecord, plan: ExportPlan) -> None:
    """Give the plan's warnings, and those of conditions that will keep the bundle from running, before the export."""
    for text in plan.warnings:
        warn(text)
    if not any(component.role == "classifier" for component in plan.components):
        warn(
            f"{plan.unclassified}, so its bundle runs only with safety switched off; add one with --safety-checker PATH"
        )
    name = scheduler.class_name
    try:
        sampler = find(name)
        for task in plan.tasks:
            sampler.read(scheduler.config_for(task, sampler.class_name))
        check_suits(name, name)
    except RequestError as error:
        warn(
            f"the checkpoint's own scheduler, {name}, is not supported ({error}); select another with --sampler at "
            "each run"
        )


def _check_lengths(plan: ExportPlan, tokenizers: Mapping[str, TokenizerRecord]) -> None:
    """Check that chunks have one length where the outputs of several text encoders are joined.

    Raises:
        CheckpointError: they differ.
    """
    for source in (source for component in plan.components for source in component.sources.values() if "+" in source):
        encoders = [each.partition(".")[0] for each in source.split("+")]
        lengths = [tokenizers[encoder].length for encoder in encoders]
        if len({*lengths}) > 1:
            raise CheckpointError(
                f"got chunks of {' and '.join(map(str, lengths))} tokens for {' and '.join(encoders)}, whose outputs "
                "are joined, expected one length; set the same model_max_length in the tokenizer_config.json of their "
                "tokenizers"
            )


def _copy_documents(checkpoint: Checkpoint, bundle: Path) -> Licence:
    for name, path in checkpoint.documents.items():
        try:
            text = read_small_file(path, _MAX_DOCUMENT_BYTES)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        (bundle / name).write_bytes(text)
    return Licence(name=checkpoint.licence, file="LICENSE" if "LICENSE" in checkpoint.documents else None)


def _write_first_arrays(
    plan: ExportPlan,
    stage: Stage,
    tokenizers: Mapping[str, TokenizerRecord],
    quantization: QuantizationOptions | None,
) -> Path:
    """Write the arrays that need no component, those behind gate inputs (tokens, the training noise, limits of options)
    and those for calibration.

    Returns:
        The .npz file.
    """
    arrays: dict[str, Any] = {"option:clip_skip": np.array(plan.limits.max_clip_skip)}
    for name, record in tokenizers.items():
        tokenizer = Tokenizer.from_json((stage.bundle / record.file).read_bytes(), record)
        arrays[f"tokens:{name}"] = tokenize_prompts(tokenizer.chunks)
        if quantization is not None:
            prompts = ["", *(quantization.prompts or filter(None, PROMPTS))]
            arrays[f"calibration:tokens:{name}"] = tokenize_prompts(tokenizer.chunks, prompts)
    height, width = plan.defaults.height, plan.defaults.width
    if quantization is not None:
        arrays["calibration:micro-conditioning"] = np.array([height, width, 0, 0, height, width], np.float32)
    for name, space in plan.latent_spaces.items():
        try:
            arrays[f"alphas_cumprod:{name}"] = training_alphas(plan.scheduler_config)
        except RequestError as error:
            raise CheckpointError(f"the scheduler's training noise schedule is not supported: {error}") from error
        training = json.dumps(select_training_config(plan.scheduler_config))
        arrays[f"noise_schedule:{name}"] = np.array(training)
        if quantization is not None:
            arrays[f"latent_size:{name}"] = np.array([height, width]) // space.downscale
    path = stage.scratch / "gate-inputs.npz"
    np.savez(path, **arrays)
    return path


def _write_last(path: Path, data: bytes) -> None:
    """Write the manifest, which makes a folder a bundle, atomically and after all other files are on the disk."""
    for other in path.parent.rglob("*"):
        if other.is_file():
            _flush(other)
    draft = path.with_suffix(".draft")
    draft.write_bytes(data)
    _flush(draft)
    replace_file(draft, path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

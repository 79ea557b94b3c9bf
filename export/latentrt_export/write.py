"""Graphs, weights and documents → the files of a bundle."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentrt import __version__
from latentrt.bundle.digests import file_record
from latentrt.bundle.gate_inputs import PROMPTS
from latentrt.bundle.manifest import (
    FORMAT_VERSION,
    Component,
    Defaults,
    LatentGeometry,
    Licence,
    Limits,
    Manifest,
    Precision,
    SchedulerRecord,
    Source,
    TokenizerRecord,
)
from latentrt.bundle.manifest_json import encode_manifest
from latentrt.bundle.staging import Stage
from latentrt.errors import CheckpointError, RequestError
from latentrt.sampling.samplers import check_suits, find
from latentrt.sampling.samplers.ddim import DDIM
from latentrt.text.tokenizer import Tokenizer
from latentrt_export.checkpoints.checkpoint import Checkpoint
from latentrt_export.checkpoints.tokenizer import export_tokenizer
from latentrt_export.quantize.options import QuantizationOptions
from latentrt_export.worker import SUBMODULES, Division, Done, Job
from latentrt_export.workers import run_worker

__all__ = ["MAX_STEPS", "Progress", "write_bundle"]

MAX_STEPS = 1000
_NOISE_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)


class Progress(Protocol):
    """Who is told how an export goes."""

    def phase(self, submodule: str, text: str) -> None:
        """A submodule has come to this phase."""

    def done(self, submodule: str, component: Component) -> None:
        """A submodule is finished."""

    def warn(self, text: str) -> None:
        """Something a user should know and that does not stop the export."""


def write_bundle(
    checkpoint: Checkpoint,
    stage: Stage,
    *,
    precision: Precision,
    division: Division | None,
    token_merging: float | None,
    quantizing: QuantizationOptions | None,
    default_steps: int,
    default_guidance_scale: float,
    progress: Progress,
) -> Manifest:
    """Export every submodule and write the bundle's files, the manifest last.

    Args:
        checkpoint: what to export.
        stage: where to; its scratch folder takes what submodules hand on.
        precision: of the weights, and of the arithmetic on a GPU.
        division: how the denoiser is divided into parts, None for not at all.
        token_merging: the share of tokens that its self-attention leaves out, None for none.
        quantizing: how int8 graphs are made, where the precision is int8.
        default_steps: how many steps a request means that does not say.
        default_guidance_scale: the same of guidance.
        progress: told of phases, results and warnings.

    Raises:
        CheckpointError, ExportError: the checkpoint cannot be exported.
        OSError: the bundle cannot be written.
    """
    _warn_of_what_a_run_will_need(checkpoint, progress)
    tokenizer = export_tokenizer(checkpoint.folder, stage.bundle)
    licence = _copy_documents(checkpoint, stage.bundle)
    known = _first_inputs(checkpoint, stage, tokenizer, quantizing)
    results = _export_submodules(
        checkpoint, stage.bundle, known, precision, division, token_merging, quantizing, progress
    )
    facts = {key: value for done in results.values() for key, value in done.facts.items()}
    defaults = Defaults(
        height=facts["latent_height"] * facts["factor"],
        width=facts["latent_width"] * facts["factor"],
        num_inference_steps=default_steps,
        guidance_scale=default_guidance_scale,
    )
    components = {name: done.component for name, done in results.items()}
    manifest = _manifest(checkpoint, stage.bundle, tokenizer, licence, components, facts, precision, defaults)
    _write_last(stage.bundle / "bundle.json", encode_manifest(manifest))
    return manifest


def _warn_of_what_a_run_will_need(checkpoint: Checkpoint, progress: Progress) -> None:
    """Said before the long work starts, so that it can be mended without doing that twice."""
    if "safety_checker" not in checkpoint.weights:
        progress.warn(
            "the checkpoint has no safety checker; its bundle will not run unless safety is switched off. "
            "--safety-checker PATH puts one in"
        )
    try:
        find(checkpoint.scheduler_class).read(checkpoint.scheduler_config)
        check_suits(checkpoint.scheduler_class, checkpoint.scheduler_class)
    except RequestError as error:
        progress.warn(
            f"the checkpoint's own scheduler, {checkpoint.scheduler_class}, cannot be run; name another with --sampler "
            f"at each run: {error}"
        )


def _copy_documents(checkpoint: Checkpoint, bundle: Path) -> Licence:
    for name, path in checkpoint.documents.items():
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        (bundle / name).write_bytes(text)
    return Licence(name=checkpoint.licence, file="LICENSE" if "LICENSE" in checkpoint.documents else None)


def _first_inputs(
    checkpoint: Checkpoint, stage: Stage, tokenizer: TokenizerRecord, quantizing: QuantizationOptions | None
) -> Path:
    """What the graphs are judged on begins with prompts and the noise levels that the model was trained on."""
    ids = Tokenizer.from_json((stage.bundle / tokenizer.file).read_bytes(), tokenizer)
    chunks = np.concatenate([ids.chunks(prompt)[:1] for prompt in PROMPTS])  # (P, 77)
    try:
        config = {key: value for key, value in checkpoint.scheduler_config.items() if key in _NOISE_KEYS}
        noise = DDIM.read(config)
    except RequestError as error:
        raise CheckpointError(f"its training noise schedule is not one of Stable Diffusion's: {error}") from error
    known = stage.scratch / "known.npz"
    alphas = noise.alphas_cumprod(zero_snr=noise.rescale_betas_zero_snr)
    arrays: dict[str, Any] = {"input_ids": chunks, "alphas_cumprod": alphas}
    if quantizing is not None:
        prompts = ["", *(quantizing.prompts or filter(None, PROMPTS))]
        arrays["calibration_ids"] = np.concatenate([ids.chunks(prompt)[:1] for prompt in prompts])  # (1 + P, 77)
        arrays["noise_schedule"] = np.array(json.dumps(config))
    np.savez(known, **arrays)
    return known


def _export_submodules(
    checkpoint: Checkpoint,
    bundle: Path,
    known: Path,
    precision: Precision,
    division: Division | None,
    token_merging: float | None,
    quantizing: QuantizationOptions | None,
    progress: Progress,
) -> dict[str, Done]:
    results: dict[str, Done] = {}
    for name, (_, part) in SUBMODULES.items():
        weights = checkpoint.weights.get(part)
        if weights is None:
            continue
        job = Job(
            submodule=name,
            checkpoint=str(weights.root.absolute()),
            variant=weights.variant,
            precision=precision,
            folder=str(bundle / name),
            prefix=f"{name}/",
            known=str(known),
            division=division,
            token_merging=token_merging,
            quantizing=quantizing,
        )
        results[name] = run_worker(job, _told(progress, name))
        progress.done(name, results[name].component)
    return results


def _told(progress: Progress, name: str) -> Callable[[str], None]:
    return lambda text: progress.phase(name, text)


def _manifest(
    checkpoint: Checkpoint,
    bundle: Path,
    tokenizer: TokenizerRecord,
    licence: Licence,
    components: Mapping[str, Component],
    facts: Mapping[str, Any],
    precision: Precision,
    defaults: Defaults,
) -> Manifest:
    factor = facts["factor"]
    files = sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file())
    sources = {name: file_record(path).sha256 for name, path in checkpoint.sources.items()}
    return Manifest(
        format_version=FORMAT_VERSION,
        created_by=f"latentrt {__version__}",
        family=facts["family"],
        source=Source(name=checkpoint.name, layout=checkpoint.layout, weights=sources),
        licence=licence,
        precision=precision,
        components=dict(components),
        tokenizer=tokenizer,
        scheduler=SchedulerRecord(class_name=checkpoint.scheduler_class, config=dict(checkpoint.scheduler_config)),
        latents=LatentGeometry(
            channels=facts["latent_channels"], factor=factor, scaling_factor=facts["scaling_factor"]
        ),
        defaults=defaults,
        limits=_limits(factor, facts["text_layers"]),
        files={name: file_record(bundle / name) for name in files},
    )


def _limits(factor: int, text_layers: int) -> Limits:
    sides = {"min_side": 8 * factor, "max_side": 256 * factor}
    return Limits(**sides, max_batch=32, max_steps=MAX_STEPS, max_clip_skip=text_layers)


def _write_last(path: Path, data: bytes) -> None:
    """The manifest makes a folder a bundle, so it appears in one go and after everything else is on the disk."""
    for other in path.parent.rglob("*"):
        if other.is_file():
            _flush(other)
    draft = path.with_suffix(".draft")
    draft.write_bytes(data)
    _flush(draft)
    draft.rename(path)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())

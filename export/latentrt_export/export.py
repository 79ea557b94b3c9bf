"""Exports a checkpoint as a bundle: the entry point of this package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec

from latentrt.bundle.manifest import Defaults, Manifest, Precision
from latentrt.bundle.staging import staged
from latentrt.errors import CheckpointError, RequestError
from latentrt.hub import HubPath, find_origin
from latentrt_export.checkpoints import single_file
from latentrt_export.checkpoints.checkpoint import (
    NONE_GIVEN,
    UNKNOWN_LICENCE,
    Checkpoint,
    GivenComponents,
    WantedComponents,
    find_documents,
    find_licence,
    open_checkpoint,
)
from latentrt_export.checkpoints.checkpoint_files import SourceFile
from latentrt_export.checkpoints.hub_checkpoint import fetch_inputs
from latentrt_export.checkpoints.vae_file import unpack_vae
from latentrt_export.export_warning import relay_warnings, warn
from latentrt_export.families import PIPELINES, REFUSALS, plan_export
from latentrt_export.graphs.deep_cache import check_branch
from latentrt_export.graphs.onnxruntime_cpu import require
from latentrt_export.quantize.options import QuantizationOptions
from latentrt_export.token_merging_ratio import check_ratio
from latentrt_export.worker import SplitOptions
from latentrt_export.write import Progress, write_bundle

__all__ = ["export_checkpoint"]

MAX_STEPS = 1000
MAX_GUIDANCE_SCALE = 100.0  # far above every useful scale


def export_checkpoint(
    checkpoint: Path | HubPath,
    bundle: Path,
    *,
    progress: Progress,
    precision: Precision = "float32",
    variant: str | None = None,
    given: WantedComponents = NONE_GIVEN,
    prediction_type: single_file.PredictionType | None = None,
    config: Path | HubPath | None = None,
    default_steps: int | None = None,
    default_guidance_scale: float | None = None,
    parts: bool = True,
    deep_cache: int | None = None,
    token_merging: float | None = None,
    quantization: QuantizationOptions | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Export a checkpoint.

    The bundle is written to a folder next to `bundle`, which is renamed when it is complete: after a failure there is
    no partial bundle, and an existing one is unchanged. The same checkpoint and options give the same bundle, byte for
    byte.

    Args:
        checkpoint: a diffusers folder, or a single `.safetensors` file of Stable Diffusion 1.x or 2.x; local, or on the
            Hugging Face hub, from which the files that are needed are downloaded into its cache.
        bundle: the folder to create.
        progress: notified of steps, results and warnings.
        precision: `float32`; `float16`, half weights with a half graph and a float32 one over them; `int8`, for CPUs.
        variant: the variant of a folder's weight files (`fp16`).
        given: the components to use instead of the checkpoint's own, or beside them.
        prediction_type: the model output of a single-file checkpoint, if its metadata does not have it.
        config: a diffusers folder whose configurations describe a single file; by default those of SD 1.x and 2.x.
        default_steps, default_guidance_scale: the values for requests that omit them; None takes those of the diffusers
            pipeline.
        parts: whether the denoiser is split for a shorter loop, and the decoder into slices.
        deep_cache: the branch at which the part `shallow_body` is split off, 0 the shallowest; None omits that part.
        token_merging: the share of tokens that the denoiser merges (`token_merging.py`); None merges none.
        quantization: the options of int8 graphs; None for the defaults.
        overwrite: replace an existing bundle, once the new one is complete.

    Returns:
        The bundle's manifest.

    Raises:
        RequestError: a default or a ratio is out of range, options contradict one another, or the denoiser has no such
            branch.
        CheckpointError, ExportError: the checkpoint cannot be exported.
        MissingExtraError: ONNX Runtime, which graphs are compared with, is not installed.
        HubError: an input on the hub cannot be downloaded.
        OutputError: the bundle cannot be written.
    """
    require()
    _check_defaults(default_steps, default_guidance_scale)
    _check_options(precision, quantization, parts, deep_cache, token_merging)
    with staged(bundle, overwrite=overwrite) as stage, relay_warnings(progress.warn):
        inputs = fetch_inputs(
            checkpoint, given, config, pipelines=PIPELINES, refusals=REFUSALS, variant=variant, downloads=progress
        )
        checkpoint, given, config = inputs.checkpoint, inputs.given, inputs.config
        _check_source_options(checkpoint, variant, prediction_type, config)
        single_files = {path: SourceFile.of(path) for path in (checkpoint, given.vae) if path and path.is_file()}
        folder = checkpoint
        if checkpoint.is_file():
            folder = stage.scratch / "unpacked"
            single_file.unpack(
                checkpoint, folder, prediction_type=prediction_type, config=config, with_vae=given.vae is None
            )
        opened = open_checkpoint(
            folder,
            pipelines=PIPELINES,
            refusals=REFUSALS,
            variant=variant,
            given=_unpack_vae(given, stage.scratch / "vae", own=folder / "vae" / "config.json"),
            name=checkpoint.stem if checkpoint.is_file() else None,
            layout="single-file" if checkpoint.is_file() else "diffusers",
        )
        opened = _name_sources(opened, single_files, checkpoint, folder, given.vae)
        if inputs.documents is not None and not opened.documents:
            opened = _add_documents(opened, inputs.documents)
        plan = plan_export(opened)
        if deep_cache is not None:
            check_branch(deep_cache, plan.deep_cache_branches)
        if opened.licence == UNKNOWN_LICENCE:
            warn(
                "no licence was found in the checkpoint; the bundle records 'unknown'. Clarify it before you "
                "distribute the bundle"
            )
        plan = replace(plan, defaults=_override_defaults(plan.defaults, default_steps, default_guidance_scale))
        if precision == "int8":
            quantization = _fill_guidance(quantization or QuantizationOptions(), plan.defaults)
        return write_bundle(
            opened,
            plan,
            stage,
            precision=precision,
            split=SplitOptions(deep_cache=deep_cache) if parts else None,
            token_merging=token_merging,
            quantization=quantization,
            progress=progress,
        )


def _check_defaults(steps: int | None, guidance_scale: float | None) -> None:
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise RequestError(f"--default-steps: got {steps}, expected 1 to {MAX_STEPS}")
    if guidance_scale is not None and not 0 <= guidance_scale <= MAX_GUIDANCE_SCALE:
        raise RequestError(f"--default-guidance-scale: got {guidance_scale:g}, expected 0 to {MAX_GUIDANCE_SCALE:g}")


def _override_defaults(defaults: Defaults, steps: int | None, guidance_scale: float | None) -> Defaults:
    return msgspec.structs.replace(
        defaults,
        num_inference_steps=defaults.num_inference_steps if steps is None else steps,
        guidance_scale=defaults.guidance_scale if guidance_scale is None else guidance_scale,
    )


def _fill_guidance(options: QuantizationOptions, defaults: Defaults) -> QuantizationOptions:
    """Return the options with the guidance of the bundle's requests, as which calibration runs.

    A guidance scale that the options have stays.
    """
    scale = options.guidance_scale
    return msgspec.structs.replace(
        options,
        guidance_scale=defaults.guidance_scale if scale is None else scale,
        force_zeros_for_empty_prompt=defaults.force_zeros_for_empty_prompt,
    )


def _check_options(
    precision: Precision,
    quantization: QuantizationOptions | None,
    parts: bool,
    deep_cache: int | None,
    token_merging: float | None,
) -> None:
    if token_merging is not None:
        check_ratio(token_merging)
    if deep_cache is not None and not parts:
        raise RequestError("got --deep-cache with --no-parts, expected one of the two: --deep-cache adds a part")
    if quantization is not None and precision != "int8":
        raise RequestError(f"got options of quantisation with the precision {precision}, expected --precision int8")


def _check_source_options(
    checkpoint: Path, variant: str | None, prediction_type: str | None, config: Path | None
) -> None:
    if checkpoint.is_file() and variant is not None:
        raise CheckpointError(f"--variant: got {variant} with a single file, which has one set of weights; omit it")
    if checkpoint.is_dir() and (prediction_type is not None or config is not None):
        raise CheckpointError(
            "got --prediction-type or --config with a diffusers folder, expected them with a single file only; a "
            "folder has its own. Change scheduler/scheduler_config.json if it is wrong"
        )


def _unpack_vae(given: GivenComponents, into: Path, *, own: Path) -> GivenComponents:
    """Return the components with the autoencoder's folder, which a single file is unpacked into."""
    if given.vae is None or not given.vae.is_file():
        return given
    return replace(given, vae=unpack_vae(given.vae, into, own=own))


def _name_sources(
    opened: Checkpoint, single_files: Mapping[Path, SourceFile], checkpoint: Path, folder: Path, vae: Path | None
) -> Checkpoint:
    """Name the user's single files as sources instead of the files unpacked from them, and take a file's licence."""
    sources, licence = dict(opened.sources), opened.licence
    if vae is not None and vae in single_files:
        sources = {name: source for name, source in sources.items() if not name.startswith("vae/")}
        sources[f"vae/{vae.name}"] = single_files[vae]
    if checkpoint in single_files:
        others = {name: source for name, source in sources.items() if not source.path.is_relative_to(folder)}
        sources = {checkpoint.name: single_files[checkpoint], **others}
        licence = single_file.detect(checkpoint, with_vae=vae is None).licence or licence
        opened = replace(opened, origin=find_origin(checkpoint.parent))
    return replace(opened, licence=licence, sources=sources)


def _add_documents(opened: Checkpoint, folder: Path) -> Checkpoint:
    """Take the licence and the model card of a repository for a checkpoint that is a file or a folder in it."""
    documents = find_documents(folder)
    licence = find_licence(documents) if opened.licence == UNKNOWN_LICENCE else opened.licence
    return replace(opened, documents=documents, licence=licence)

"""How does a checkpoint become a bundle? Newcomers start here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from latentrt.bundle.manifest import Manifest, Precision
from latentrt.bundle.staging import staged
from latentrt.errors import CheckpointError, RequestError
from latentrt_export.checkpoints import single_file
from latentrt_export.checkpoints.checkpoint import UNKNOWN_LICENCE, Checkpoint, PipelineClass, open_checkpoint
from latentrt_export.checkpoints.json_file import read_object
from latentrt_export.graphs.deep_cache import check_branch, count_branches
from latentrt_export.graphs.onnxruntime_cpu import require
from latentrt_export.quantize.options import QuantizationOptions
from latentrt_export.token_merging_ratio import check_ratio
from latentrt_export.worker import Division
from latentrt_export.write import MAX_STEPS, Progress, write_bundle

__all__ = ["export_checkpoint"]

_PIPELINES = {
    "StableDiffusionPipeline": PipelineClass(
        components={
            "text_encoder": "model",
            "unet": "diffusion_pytorch_model",
            "vae": "diffusion_pytorch_model",
        }
    )
}
MAX_GUIDANCE_SCALE = 100.0  # far above any that a picture survives


def export_checkpoint(
    checkpoint: Path,
    bundle: Path,
    *,
    progress: Progress,
    precision: Precision = "float32",
    variant: str | None = None,
    safety_checker: Path | None = None,
    preview_decoder: Path | None = None,
    prediction_type: single_file.PredictionType | None = None,
    config: Path | None = None,
    default_steps: int = 50,
    default_guidance_scale: float = 7.5,
    parts: bool = True,
    deep_cache: int | None = None,
    token_merging: float | None = None,
    quantizing: QuantizationOptions | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Export a checkpoint.

    Everything is made in a folder beside `bundle`, which is renamed when it is complete: whatever happens on the way,
    no half bundle appears and what was there before is untouched.

    Args:
        checkpoint: a diffusers folder, or a single `.safetensors` file of Stable Diffusion 1.x or 2.x.
        bundle: the folder to make.
        progress: told of phases, results and warnings.
        precision: `float32`; `float16`, half weights with a half graph and a float32 one over them; `int8`, for CPUs.
        variant: which weight files of a folder to take (`fp16`).
        safety_checker: a classifier to take instead of the checkpoint's own: its folder, or a checkpoint that has one.
        preview_decoder: a tiny autoencoder (diffusers' `AutoencoderTiny`) whose decoder comes along, for previews.
        prediction_type: what a single-file model was trained to predict, where the file does not say.
        config: a diffusers folder whose configurations describe a single file; by default those of SD 1.x and 2.x.
        default_steps, default_guidance_scale: what a request means that does not say them; diffusers' own by default.
        parts: of the denoiser, those for a shorter loop (`split.py`); of the decoder, slices (`slices.py`).
        deep_cache: the branch at which the loop is cut for a part `shallow`, 0 the shallowest; None for no such part.
        token_merging: the share of tokens that the denoiser merges (`token_merging.py`); None for none.
        quantizing: how int8 graphs are made; None is the defaults.
        overwrite: replace a bundle that is there, once the new one is complete.

    Returns:
        The bundle's manifest.

    Raises:
        RequestError: a default or a ratio is impossible, or the denoiser has no such branch.
        CheckpointError, ExportError: the checkpoint cannot be exported.
        MissingExtraError: no ONNX Runtime is installed, so nothing could be proved.
        OutputError: the bundle cannot be written.
    """
    require()
    _check_defaults(default_steps, default_guidance_scale)
    _check_options(precision, quantizing, parts, deep_cache, token_merging)
    with staged(bundle, overwrite=overwrite) as stage:
        _refuse_what_would_be_ignored(checkpoint, variant, prediction_type, config)
        if checkpoint.is_file():
            unpacked = stage.scratch / "unpacked"
            opened = _unpacked(checkpoint, unpacked, prediction_type, config, safety_checker, preview_decoder)
        else:
            opened = open_checkpoint(
                checkpoint,
                pipelines=_PIPELINES,
                variant=variant,
                safety_checker=safety_checker,
                preview_decoder=preview_decoder,
            )
        _check_branch(opened, deep_cache)
        _warn_of_no_licence(opened, progress)
        return write_bundle(
            opened,
            stage,
            precision=precision,
            division=Division(deep_cache=deep_cache) if parts else None,
            token_merging=token_merging,
            quantizing=quantizing or _default_quantizing(precision, default_guidance_scale),
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            progress=progress,
        )


def _default_quantizing(precision: Precision, guidance_scale: float) -> QuantizationOptions | None:
    """Calibrated as the bundle's runs will be guided."""
    return QuantizationOptions(guidance_scale=guidance_scale) if precision == "int8" else None


def _check_defaults(steps: int, guidance_scale: float) -> None:
    if not 1 <= steps <= MAX_STEPS:
        raise RequestError(f"found {steps} steps as the default, expected 1 to {MAX_STEPS}")
    if not 0 <= guidance_scale <= MAX_GUIDANCE_SCALE:
        raise RequestError(
            f"found a guidance scale of {guidance_scale:g} as the default, expected 0 to {MAX_GUIDANCE_SCALE:g}"
        )


def _check_options(
    precision: Precision,
    quantizing: QuantizationOptions | None,
    parts: bool,
    deep_cache: int | None,
    token_merging: float | None,
) -> None:
    if token_merging is not None:
        check_ratio(token_merging)
    if deep_cache is not None and not parts:
        raise RequestError("found --deep-cache with --no-parts, but it is the parts that it adds one to; leave one out")
    if quantizing is not None and precision != "int8":
        raise RequestError(f"found options of quantisation with the precision {precision}, they are for int8")


def _warn_of_no_licence(opened: Checkpoint, progress: Progress) -> None:
    if opened.licence == UNKNOWN_LICENCE:
        progress.warn(
            "no licence was found beside the checkpoint; the bundle will say 'unknown'. Find out before you ship it"
        )


def _check_branch(checkpoint: Checkpoint, branch: int | None) -> None:
    if branch is not None:
        unet = read_object(checkpoint.weights["unet"].root / "unet" / "config.json")
        check_branch(branch, count_branches(unet))


def _refuse_what_would_be_ignored(
    checkpoint: Path, variant: str | None, prediction_type: str | None, config: Path | None
) -> None:
    if checkpoint.is_file() and variant is not None:
        raise CheckpointError(f"found variant {variant} with a single file, which has one set of weights; leave it out")
    if checkpoint.is_dir() and (prediction_type is not None or config is not None):
        raise CheckpointError(
            "found a prediction type or a config for a diffusers folder, which has its own; they are for single files. "
            "Change scheduler/scheduler_config.json if it is wrong"
        )


def _unpacked(
    file: Path,
    folder: Path,
    prediction_type: single_file.PredictionType | None,
    config: Path | None,
    safety_checker: Path | None,
    preview_decoder: Path | None,
) -> Checkpoint:
    """A single file, as the folder that it is unpacked into."""
    stated = single_file.detect(file).licence
    single_file.unpack(file, folder, prediction_type=prediction_type, config=config)
    opened = open_checkpoint(
        folder,
        pipelines=_PIPELINES,
        safety_checker=safety_checker,
        preview_decoder=preview_decoder,
        name=file.stem,
        layout="single-file",
    )
    others = {name: path for name, path in opened.sources.items() if not path.is_relative_to(folder)}
    return replace(opened, licence=stated or opened.licence, sources={file.name: file, **others})

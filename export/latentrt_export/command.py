"""The command `latentrt export`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentrt.bundle.manifest import Manifest, Precision, QuantizationMethod
from latentrt.cli.output import echo
from latentrt.cli.repository import Location
from latentrt.errors import MissingExtraError
from latentrt.hub import HubPath

if TYPE_CHECKING:
    from latentrt_export.checkpoints.single_file import PredictionType

__all__ = ["export"]


@click.command()
@click.argument("checkpoint", type=Location())
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="Precision of the weights, and of the arithmetic on a GPU; int8 is for CPUs.",
)
@click.option(
    "--quantization",
    type=click.Choice(["static", "weights"]),
    help="What int8 quantises: weights and activations (static, the default), or weights alone.",
)
@click.option(
    "--calibration-prompts",
    type=click.Path(path_type=Path),
    help="A file of prompts, one per line, for the runs that calibrate activations.",
)
@click.option("--calibration-steps", type=int, help="Steps of each calibration run; 10 by default.")
@click.option("--variant", help="The weight files to use if a checkpoint has several, such as fp16.")
@click.option(
    "--safety-checker",
    type=Location(),
    help="A classifier's folder, or a checkpoint that has one; like CHECKPOINT, also on the hub.",
)
@click.option(
    "--preview-decoder",
    type=Location(),
    help="The folder of a tiny autoencoder (TAESD), whose decoder is added for previews.",
)
@click.option(
    "--vae",
    type=Location(),
    help="An autoencoder in place of the checkpoint's own: a folder, or a .safetensors file.",
)
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction"]),
    help="The model output of a single-file checkpoint.",
)
@click.option(
    "--config",
    type=Location(),
    help="A diffusers folder whose configurations describe a single-file checkpoint.",
)
@click.option(
    "--default-steps",
    type=int,
    help="Steps of a request that omits them; by default those of diffusers' pipeline, 50 for text to image.",
)
@click.option(
    "--default-guidance-scale",
    type=float,
    help="Guidance scale of a request that omits it (at most 1: none); by default that of diffusers' pipeline.",
)
@click.option("--no-parts", is_flag=True, help="Omit the parts for a shorter loop and for decoding in slices.")
@click.option(
    "--deep-cache",
    type=int,
    metavar="BRANCH",
    help="Add a part that reuses the deep features of an earlier step (DeepCache); branch 0 computes the least.",
)
@click.option(
    "--token-merging",
    type=float,
    metavar="RATIO",
    help="Merge this share of the tokens in the denoiser's largest self-attentions; 0.5 is usual.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle, once the new one is complete.")
def export(
    checkpoint: Path | HubPath,
    bundle: Path,
    precision: Precision,
    quantization: QuantizationMethod | None,
    calibration_prompts: Path | None,
    calibration_steps: int | None,
    variant: str | None,
    safety_checker: Path | HubPath | None,
    preview_decoder: Path | HubPath | None,
    vae: Path | HubPath | None,
    prediction_type: PredictionType | None,
    config: Path | HubPath | None,
    default_steps: int | None,
    default_guidance_scale: float | None,
    no_parts: bool,
    deep_cache: int | None,
    token_merging: float | None,
    overwrite: bool,
) -> None:
    """Export CHECKPOINT, a diffusers folder or a single .safetensors file, as BUNDLE.

    CHECKPOINT is a path, or a repository of the Hugging Face hub: OWNER/NAME, hf://OWNER/NAME@REVISION or
    hf://OWNER/NAME/FILE.safetensors. Only the files that are needed are downloaded.

    Every graph is compared with torch; if one misses its bound, the export stops and nothing is written.
    """
    from latentrt_export.checkpoints.checkpoint import WantedComponents
    from latentrt_export.quantize.options import read_options
    from latentrt_export.report import Reporter, print_table

    started = time.monotonic()
    quantization_options = read_options(quantization, calibration_prompts, calibration_steps)
    with Reporter() as reporter:
        manifest = _exporter()(
            checkpoint,
            bundle,
            precision=precision,
            quantization=quantization_options,
            variant=variant,
            given=WantedComponents(vae=vae, safety_checker=safety_checker, preview_decoder=preview_decoder),
            prediction_type=prediction_type,
            config=config,
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            parts=not no_parts,
            deep_cache=deep_cache,
            token_merging=token_merging,
            overwrite=overwrite,
            progress=reporter,
        )
    print_table(manifest, reporter.costs)
    echo(f"{bundle}: {manifest.precision}, exported in {time.monotonic() - started:.0f} s")


def _exporter() -> Callable[..., Manifest]:
    """Import the exporter, which needs the extra `export`."""
    try:
        from latentrt_export.export import export_checkpoint
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export", "export a checkpoint") from error
    return export_checkpoint

"""The command `latentrt export`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentrt.bundle.manifest import Manifest, Precision, QuantizationMethod
from latentrt.errors import MissingExtraError
from latentrt.worker_process import terminable

if TYPE_CHECKING:
    from latentrt_export.checkpoints.single_file import PredictionType

__all__ = ["export"]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    show_default=True,
    help="Of the weights and of a GPU's arithmetic; int8 is for CPUs.",
)
@click.option(
    "--quantization",
    type=click.Choice(["static", "weights"]),
    help="What int8 rounds: weights and activations (static, the default), or weights alone.",
)
@click.option(
    "--calibration-prompts",
    type=click.Path(path_type=Path),
    help="Prompts, one a line, of the runs in which activations are measured.",
)
@click.option("--calibration-steps", type=int, help="Of each of those runs; 10 by default.")
@click.option("--variant", help="Which weight files to take where a checkpoint has several, such as fp16.")
@click.option(
    "--safety-checker", type=click.Path(path_type=Path), help="A classifier's folder, or a checkpoint that has one."
)
@click.option(
    "--preview-decoder",
    type=click.Path(path_type=Path),
    help="The folder of a tiny autoencoder (TAESD), whose decoder comes along for previews.",
)
@click.option(
    "--prediction-type",
    type=click.Choice(["epsilon", "v_prediction"]),
    help="What a single-file checkpoint was trained to predict.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="A diffusers folder whose configurations describe a single-file checkpoint.",
)
@click.option("--default-steps", type=int, default=50, show_default=True, help="What a run does that does not say.")
@click.option(
    "--default-guidance-scale", type=float, default=7.5, show_default=True, help="The same; up to 1 there is none."
)
@click.option("--no-parts", is_flag=True, help="Leave out the parts for a shorter loop and for decoding in slices.")
@click.option(
    "--deep-cache",
    type=int,
    metavar="BRANCH",
    help="Add a part that takes deep features of an earlier step; branch 0 leaves the least to compute.",
)
@click.option(
    "--token-merging",
    type=float,
    metavar="RATIO",
    help="Merge this share of the tokens in the denoiser's largest self-attentions; 0.5 is usual.",
)
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there, once the new one is complete.")
def export(
    checkpoint: Path,
    bundle: Path,
    precision: Precision,
    quantization: QuantizationMethod | None,
    calibration_prompts: Path | None,
    calibration_steps: int | None,
    variant: str | None,
    safety_checker: Path | None,
    preview_decoder: Path | None,
    prediction_type: PredictionType | None,
    config: Path | None,
    default_steps: int,
    default_guidance_scale: float,
    no_parts: bool,
    deep_cache: int | None,
    token_merging: float | None,
    overwrite: bool,
) -> None:
    """Turn CHECKPOINT, a diffusers folder or a single .safetensors file, into BUNDLE.

    Every graph is compared with torch on the way; one that misses its bound stops the export and nothing is written.
    """
    from latentrt_export.quantize.options import read_options
    from latentrt_export.report import Reporter, print_table

    started = time.monotonic()
    quantizing = read_options(quantization, calibration_prompts, calibration_steps, default_guidance_scale)
    with terminable(), Reporter() as reporter:
        manifest = _exporter()(
            checkpoint,
            bundle,
            precision=precision,
            quantizing=quantizing,
            variant=variant,
            safety_checker=safety_checker,
            preview_decoder=preview_decoder,
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
    print_table(manifest)
    click.echo(f"{bundle}: {manifest.precision}, exported in {time.monotonic() - started:.0f} s")


def _exporter() -> Callable[..., Manifest]:
    """The exporter, or the extra to install."""
    try:
        from latentrt_export.export import export_checkpoint
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export", "export a checkpoint") from error
    return export_checkpoint

"""The command `latentrt export`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.export_report import ComponentCost
from latentrt.bundle.manifest import Manifest, Precision, QuantizationMethod
from latentrt.bundle.sample import bundle_argument
from latentrt.cli.command import command, option, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo
from latentrt.cli.repository import Location
from latentrt.errors import MissingExtraError
from latentrt.hub import HubPath

if TYPE_CHECKING:
    from latentrt_export.checkpoints.single_file import PredictionType

__all__ = ["ExportDocument", "export"]


class ExportedComponent(msgspec.Struct, frozen=True, kw_only=True):
    """A component of a new bundle, and what its export took.

    Attributes:
        precisions: of its graphs. parameters: number of weights. size_bytes: of the file of weights.
        seconds: wall time. peak_bytes: largest resident set of the process.
    """

    precisions: list[str]
    parameters: int
    size_bytes: int
    seconds: float
    peak_bytes: int


class ExportDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt export --json`; the bundle's whole manifest is in that of `latentrt inspect --json`.

    Attributes:
        bundle: the folder. digest: of bundle.json.
        seconds: wall time of the whole export.
    """

    bundle: str
    digest: str
    precision: str
    seconds: float
    components: dict[str, ExportedComponent]


@command(
    examples=(
        "latentrt export path/to/checkpoint my-bundle --precision float16",
        "latentrt export model.safetensors my-bundle --safety-checker path/to/classifier",
        "latentrt export path/to/checkpoint my-int8 --precision int8 --calibration-prompts prompts.txt",
    )
)
@click.argument("checkpoint", type=Location())
@click.argument("bundle", type=click.Path(path_type=Path))
@option("--variant", group="Checkpoint", help="The weight files to use if a checkpoint has several, such as fp16.")
@option(
    "--prediction-type",
    group="Checkpoint",
    type=click.Choice(["epsilon", "v_prediction"]),
    help="The model output of a single-file checkpoint.",
)
@option(
    "--config",
    group="Checkpoint",
    type=Location(),
    help="A diffusers folder whose configurations describe a single-file checkpoint.",
)
@option(
    "--precision",
    group="Precision",
    type=click.Choice(["float32", "float16", "int8"]),
    default="float32",
    help="Precision of the weights, and of the arithmetic on a GPU; int8 is for CPUs.",
)
@option(
    "--quantization",
    group="Precision",
    type=click.Choice(["static", "weights"]),
    help="What int8 quantises: weights and activations (static, the default), or weights alone.",
)
@option(
    "--calibration-prompts",
    group="Precision",
    type=click.Path(path_type=Path),
    help="A file of prompts, one per line, for the runs that calibrate activations.",
)
@option("--calibration-steps", group="Precision", type=int, help="Steps of each calibration run; 10 by default.")
@option(
    "--safety-checker",
    group="Components",
    type=Location(),
    help="A classifier's folder, or a checkpoint that has one; like CHECKPOINT, also on the hub.",
)
@option(
    "--preview-decoder",
    group="Components",
    type=Location(),
    help="The folder of a tiny autoencoder (TAESD), whose decoder is added for previews.",
)
@option(
    "--vae",
    group="Components",
    type=Location(),
    help="An autoencoder in place of the checkpoint's own: a folder, or a .safetensors file.",
)
@option(
    "--default-steps",
    group="Defaults of the bundle",
    type=int,
    help="Steps of a request that omits them; by default those of diffusers' pipeline, 50 for text to image.",
)
@option(
    "--default-guidance-scale",
    group="Defaults of the bundle",
    type=float,
    help="Guidance scale of a request that omits it (at most 1: none); by default that of diffusers' pipeline.",
)
@option(
    "--no-parts", group="Graphs", is_flag=True, help="Omit the parts for a shorter loop and for decoding in slices."
)
@option(
    "--deep-cache",
    group="Graphs",
    type=int,
    metavar="BRANCH",
    help="Add a part that reuses the deep features of an earlier step (DeepCache); branch 0 computes the least.",
)
@option(
    "--token-merging",
    group="Graphs",
    type=float,
    metavar="RATIO",
    help="Merge this share of the tokens in the denoiser's largest self-attentions; 0.5 is usual.",
)
@option("--overwrite", group="Output", is_flag=True, help="Replace an existing bundle, once the new one is complete.")
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
    seconds = time.monotonic() - started
    if settings().json:
        echo_document(_describe(bundle, manifest, reporter.costs, seconds))
    elif not settings().quiet:
        print_table(manifest, reporter.costs)
        echo(f"{bundle}: {manifest.precision}, exported in {seconds:.0f} s")
        echo(f'next: latentrt run {bundle_argument(bundle)} "a prompt"')


def _describe(bundle: Path, manifest: Manifest, costs: Mapping[str, ComponentCost], seconds: float) -> ExportDocument:
    components = {}
    for name, component in manifest.components.items():
        components[name] = ExportedComponent(
            precisions=list(component.graphs),
            parameters=component.weights.parameters,
            size_bytes=manifest.files[component.weights.file].size,
            seconds=costs[name].seconds,
            peak_bytes=costs[name].peak_bytes,
        )
    return ExportDocument(
        bundle=str(bundle),
        digest=Bundle.open(bundle).digest,
        precision=manifest.precision,
        seconds=round(seconds, 3),
        components=components,
    )


def _exporter() -> Callable[..., Manifest]:
    """Import the exporter, which needs the extra `export`."""
    try:
        from latentrt_export.export import export_checkpoint
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export", "export a checkpoint") from error
    return export_checkpoint

"""The command `latentrt inspect`: prints the content of a bundle, or the metadata of an image.

All output comes from files of unknown origin: it is escaped, and never interpreted as rich's markup.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.filesize import decimal
from rich.table import Table

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.describe import describe_quantization, group_parts, nearest_to_bound
from latentrt.bundle.export_report import ExportReport, read_report
from latentrt.bundle.manifest import MANIFEST_NAME, ConfigChange, GateResult, Manifest, SchedulerRecord
from latentrt.bundle.tensors import TensorSpec
from latentrt.cli.command import command, settings
from latentrt.cli.console import Console
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo, echo_block
from latentrt.cli.values import BundlePath
from latentrt.engines.sealed import read_sealed_engines
from latentrt.errors import BundleError

if TYPE_CHECKING:
    from latentrt.images.metadata import ImageMetadata, ImageRecord, InputRecord

__all__ = ["InspectDocument", "inspect"]

# Wide enough for every row, for output that is not a terminal.
_PIPE_COLUMNS = 160
_MAX_SHOWN = 20_000

Lines = Iterator[tuple[str, str]]


class InspectDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt inspect --json` for a bundle; that for an image is `ImageMetadata`.

    Attributes:
        bundle: the folder.
        digest: of bundle.json.
        manifest: the content of bundle.json (`latentrt/bundle/bundle.schema.json`).
    """

    bundle: str
    digest: str
    manifest: Manifest


@command(
    examples=(
        "latentrt inspect my-bundle",
        "latentrt inspect out.png",
        "latentrt inspect sample --json",
    )
)
@click.argument("path", type=BundlePath(files=True))
def inspect(path: Path) -> None:
    """Print the content of the bundle at PATH, or the metadata of the image at PATH.

    Nothing is verified here; `latentrt verify` does that.
    """
    if not os.path.lexists(path):
        raise BundleError(f"{path} does not exist, expected the folder of a bundle, or an image")
    if os.path.isfile(path) and path.name != MANIFEST_NAME:
        _inspect_image(path)
    else:
        _inspect_bundle(path.parent if os.path.isfile(path) else path)


def _inspect_bundle(path: Path) -> None:
    bundle = Bundle.open(path)
    if settings().json:
        echo_document(InspectDocument(bundle=str(bundle.folder), digest=bundle.digest, manifest=bundle.manifest))
        return
    _print_lines(_bundle_lines(bundle))
    console = Console(pipe_columns=_PIPE_COLUMNS)
    for table in (_component_table(bundle.manifest, read_report(bundle.folder)), _signature_table(bundle.manifest)):
        console.print()
        console.print(table)


def _inspect_image(path: Path) -> None:
    # Imported here: it needs Pillow and numpy, which a bundle's inspection does not.
    from latentrt.images.metadata import read_metadata

    metadata = read_metadata(path)
    if settings().json:
        echo_document(metadata)
        return
    _print_lines(_image_lines(path, metadata))
    if metadata.record is None and metadata.parameters is None:
        echo("no metadata of latentrt or another generator")


def _print_lines(lines: Lines) -> None:
    for key, value in lines:
        shown = value[:_MAX_SHOWN].replace("\n", "\n" + " " * 14)
        more = f" … and {len(value) - _MAX_SHOWN:,} more characters" if len(value) > _MAX_SHOWN else ""
        echo_block(f"{key:<13} {shown}{more}")


def _bundle_lines(bundle: Bundle) -> Lines:
    manifest = bundle.manifest
    yield "bundle", str(bundle.folder)
    yield "digest", bundle.digest
    yield "written by", f"{manifest.created_by}, format {manifest.format_version}"
    yield "family", manifest.family
    yield "tasks", ", ".join(manifest.tasks)
    yield "precision", manifest.precision
    yield "licence", f"{manifest.licence.name} ({manifest.licence.file or 'its text is not in the bundle'})"
    yield "source", f"{manifest.source.name} ({manifest.source.layout})"
    if manifest.source.repository is not None:
        yield "repository", f"{manifest.source.repository}, commit {manifest.source.revision}"
    for name, sha256 in manifest.source.weights.items():
        yield "", f"{name}  sha256:{sha256}"
    yield from _use_lines(manifest)
    for line in describe_quantization(manifest.components):
        yield "" if line.startswith(" ") else "int8", line.strip()
    for engine in read_sealed_engines(bundle):
        identity, size = engine.record.identity, decimal(engine.record.plan.size)
        target = f"{identity.gpu or ', '.join(identity.compute_capabilities)}, {identity.library}"
        shapes = next(iter(identity.profile.values()), "")
        yield "engine", f"{engine.record.key[:12]}  {identity.component}, {shapes}, for {target}, {size}"
    yield "files", f"{len(manifest.files)}, {decimal(manifest.size_bytes)}"


def _use_lines(manifest: Manifest) -> Lines:
    defaults, limits = manifest.defaults, manifest.limits
    for tokenizer in manifest.tokenizers.values():
        ids = f"begin {tokenizer.begin}, end {tokenizer.end}, pad {tokenizer.pad}"
        yield "tokenizer", f"{tokenizer.file}: {tokenizer.length} tokens, {ids}"
    for name, scheduler in manifest.schedulers.items():
        purpose = "" if name in manifest.components else f"{name}: "
        yield "scheduler", purpose + _describe_scheduler(scheduler)
        yield from _change_lines(scheduler.changes)
    for space in manifest.latent_spaces.values():
        yield "latents", f"{space.channels} channels, {space.downscale} pixels a side, scaled by {space.scale}"
    steps, guidance = defaults.num_inference_steps, defaults.guidance_scale
    yield "defaults", f"{defaults.width} × {defaults.height}, {steps} steps, guidance scale {guidance:g}"
    yield from _change_lines(defaults.changes)
    sides = f"{limits.min_side} … {limits.max_side} pixels a side"
    noise = f", noise level {limits.max_noise_level}" if limits.max_noise_level else ""
    yield "limits", f"{sides}, {limits.max_batch} images at once, {limits.max_steps} steps{noise}"
    for name, component in manifest.components.items():
        if merging := component.token_merging:
            share = f"{merging.ratio:g} of the tokens of {name}, in {len(merging.blocks)} of its blocks"
            yield "merging", f"{share}: {', '.join(merging.blocks)}"
    missing = "" if manifest.by_role("classifier") else ", but no classifier: it runs with --safety off only"
    yield "safety", manifest.safety + missing


def _describe_scheduler(scheduler: SchedulerRecord) -> str:
    config = scheduler.config
    known = [
        f"{key} {config[key]}" for key in ("prediction_type", "num_train_timesteps", "beta_schedule") if key in config
    ]
    return ", ".join([scheduler.class_name, *known])


def _change_lines(changes: Sequence[ConfigChange]) -> Lines:
    for change in changes:
        values = f"{json.dumps(change.used)} in place of {json.dumps(change.found)}"
        yield "", f"{change.key} {values}, as in diffusers' pipeline, for {', '.join(change.tasks)}"


def _component_table(manifest: Manifest, report: ExportReport | None) -> Table:
    table = _table("component", "graph", "opset", "nodes", "in float32", "parameters", "weights", "gate", "export")
    for name, component in manifest.components.items():
        weights = component.weights
        size = f"{weights.dtype} {decimal(manifest.files[weights.file].size)}"
        cost = report.components.get(name) if report is not None else None
        export = f"{cost.seconds:.1f} s, {decimal(cost.peak_bytes)}" if cost is not None else ""
        for precision, graph in component.graphs.items():
            counts = (str(graph.opset), f"{graph.nodes:,}", f"{len(graph.float32_nodes):,}", f"{weights.parameters:,}")
            table.add_row(name, precision, *counts, size, _describe_gate(graph.gate), export)
        for part in group_parts(component.parts):
            for precision in part.precisions:
                opset = str(part.parts[0].graphs[precision].opset)
                counts = (opset, f"{part.nodes(precision):,}", f"{part.float32_nodes(precision):,}", "")
                table.add_row(f"  {part.title}", precision, *counts, "", _describe_gate(part.gate(precision)), "")
    return table


def _describe_gate(results: tuple[GateResult, ...]) -> str:
    worst = nearest_to_bound(results)
    return "none" if worst is None else f"{worst.value:.2g} {worst.metric} of {worst.bound:.2g} ({worst.output})"


def _signature_table(manifest: Manifest) -> Table:
    table = _table("component", "inputs", "outputs")
    for name, component in manifest.components.items():
        table.add_row(name, "\n".join(map(str, component.inputs)), "\n".join(map(str, component.outputs)))
        for part in group_parts(component.parts):
            table.add_row(f"  {part.title}", *("\n".join(_summarize(specs)) for specs in (part.inputs, part.outputs)))
    return table


def _summarize(specs: Sequence[TensorSpec]) -> Iterator[str]:
    """Yield a line per tensor; tensors of one kind, such as one for each layer of a denoiser, share a line."""
    kinds: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        kinds.setdefault(spec.name.rpartition(".")[2], []).append(spec)
    for kind, alike in kinds.items():
        yield str(alike[0]) if len(alike) == 1 else f"{len(alike)} × {kind}, the first is {alike[0]}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "component")
    return table


def _image_lines(path: Path, metadata: ImageMetadata) -> Lines:
    yield "image", f"{path}: {metadata.file_format}, {metadata.width} × {metadata.height}"
    if metadata.record is not None:
        yield from _record_lines(metadata.record)
    elif metadata.parameters is not None:
        yield "parameters", metadata.parameters


def _record_lines(record: ImageRecord) -> Lines:
    for field in record.__struct_fields__:
        value = getattr(record, field)
        if field == "options":
            yield from ((_label(keyword), str(each)) for keyword, each in value.items())
        elif field == "inputs":
            yield from _input_lines(value)
        elif field != "safety" and value not in (None, "", (), 0.0):
            yield _label(field), ", ".join(value) if isinstance(value, tuple) else str(value)
    safety = record.safety
    yield "safety", "off, the image was not checked" if safety.policy == "off" else safety.policy
    if safety.flagged is not None:
        concepts = f", concepts {', '.join(map(str, safety.concepts))}" if safety.flagged else ""
        score = "" if safety.highest_score is None else f", highest score {safety.highest_score:.3f}"
        yield "flagged", f"{'yes' if safety.flagged else 'no'}{concepts}{score}"


def _input_lines(inputs: Mapping[str, InputRecord]) -> Lines:
    for keyword, record in inputs.items():
        yield f"input {_label(keyword)}", record.digest
        if record.parameters is not None:
            yield "", record.parameters


def _label(keyword: str) -> str:
    return _LABELS.get(keyword, keyword.replace("_", " "))


_LABELS = {
    "negative_prompt": "negative",
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "guidance_rescale": "rescale",
    "bundle_digest": "digest",
    "bundle_name": "bundle",
    "latentrt_version": "latentrt",
}

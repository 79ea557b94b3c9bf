"""The command `latentrt export`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentrt.errors import MissingExtraError
from latentrt.manifest import Component, GateFigure, GraphRecord, Manifest, Precision

if TYPE_CHECKING:
    from rich.console import Console


__all__ = ["export"]


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of the weights and of a GPU's arithmetic.",
)
@click.option("--variant", help="Which weight files to take where a checkpoint has several, such as fp16.")
@click.option(
    "--safety-checker", type=click.Path(path_type=Path), help="A classifier's folder, or a checkpoint that has one."
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
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there, once the new one is complete.")
def export(
    checkpoint: Path,
    bundle: Path,
    precision: Precision,
    variant: str | None,
    safety_checker: Path | None,
    prediction_type: str | None,
    config: Path | None,
    overwrite: bool,
) -> None:
    """Turn CHECKPOINT, a diffusers folder or a single .safetensors file, into BUNDLE.

    Every graph is compared with torch on the way; one that misses its bound stops the export and nothing is written.
    """
    from rich.console import Console

    export_checkpoint = _exporter()
    console = Console(stderr=True)
    started = time.monotonic()
    with _Reporter(console) as reporter:
        manifest = export_checkpoint(
            checkpoint,
            bundle,
            precision=precision,
            variant=variant,
            safety_checker=safety_checker,
            prediction_type=prediction_type,
            config=config,
            overwrite=overwrite,
            progress=reporter,
        )
    _print_table(manifest)
    click.echo(f"{bundle}: {manifest.precision}, exported in {time.monotonic() - started:.0f} s")


def _exporter():  # type: ignore[no-untyped-def]
    """The exporter, or the extra to install."""
    try:
        from latentrt_export.export import export_checkpoint
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "export", "export a checkpoint") from error
    return export_checkpoint


class _Reporter:
    """Prints a line per submodule that counts its seconds, and keeps it with what came out."""

    def __init__(self, console: Console) -> None:
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = console
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console
        )
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> _Reporter:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def phase(self, submodule: str, text: str) -> None:
        if submodule not in self._tasks:
            self._tasks[submodule] = self._progress.add_task("", total=1)
        self._describe(submodule, text)

    def done(self, submodule: str, component: Component) -> None:
        self._describe(submodule, f"done, peak memory {component.export_peak_bytes / 2**30:.1f} GiB")
        self._progress.update(self._tasks[submodule], completed=1)  # type: ignore[arg-type]

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="yellow", markup=False)

    def _describe(self, submodule: str, text: str) -> None:
        self._progress.update(self._tasks[submodule], description=f"{submodule:<15} {text}")  # type: ignore[arg-type]


def _print_table(manifest: Manifest) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("component", "graph", "nodes", "in float32", "weights", "size", "peak memory", "gate")
    for name, component in manifest.components.items():
        size = manifest.files[component.weights.file].size
        for precision, graph in component.graphs.items():
            table.add_row(
                name,
                precision,
                str(graph.nodes),
                str(len(graph.float32_nodes)) if precision == "float16" else "all",
                f"{component.weights.parameters / 1e6:.1f} M",
                f"{size / 1e6:.1f} MB",
                f"{component.export_peak_bytes / 2**30:.1f} GiB",
                ", ".join(_worst(graph)),
            )
    Console().print(table)


def _worst(graph: GraphRecord) -> list[str]:
    """The figure of each measure that came nearest to its bound."""
    worst: dict[str, GateFigure] = {}
    for gate in graph.gate:
        if (
            gate.measure not in worst
            or gate.figure / gate.bound > worst[gate.measure].figure / worst[gate.measure].bound
        ):
            worst[gate.measure] = gate
    return [f"{gate.figure:.2g} of {gate.bound:g} {measure}" for measure, gate in worst.items()]

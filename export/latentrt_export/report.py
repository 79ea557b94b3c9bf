"""Shows an export on the command line: its progress, and a table when it is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Self

from rich.box import SIMPLE
from rich.filesize import decimal
from rich.progress import Progress, SpinnerColumn, TaskID, TimeElapsedColumn
from rich.table import Table

from latentrt.bundle.describe import describe_quantization, group_parts, nearest_to_bound
from latentrt.bundle.export_report import ComponentCost
from latentrt.bundle.manifest import Component, GateResult, Manifest
from latentrt.cli.console import Console, PlainColumn
from latentrt.hub import Bytes

__all__ = ["Reporter", "print_table"]

_METRICS = {
    "relative": "relative to the largest value",
    "absolute": "absolute",
    "levels": "in levels of 255",
    "rms": "RMS over the output's RMS",
}


class Reporter:
    """A progress report with a line per component: on a terminal with a running clock, elsewhere once it is finished.

    Attributes:
        costs: the time and memory of each finished component.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(err=True)
        columns = (SpinnerColumn(finished_text="✓"), PlainColumn("{task.description}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}
        self._started = time.monotonic()
        self.costs: dict[str, ComponentCost] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def phase(self, component: str, text: str) -> None:
        """Show the step that a component begins."""
        if component not in self._tasks:
            self._tasks[component] = self._progress.add_task("", total=1)
        self._progress.update(self._tasks[component], description=f"{component:<14}  {text}")

    def done(self, component: str, record: Component, cost: ComponentCost) -> None:
        """Show that a component is finished, with its time and memory."""
        self.costs[component] = cost
        peak = f"peak memory {_gibibytes(cost.peak_bytes)}"
        self.phase(component, f"done, {peak}")
        self._progress.update(self._tasks[component], completed=1)
        if not self._console.is_terminal:
            total = time.monotonic() - self._started
            self._print(f"{component:<14}  done in {cost.seconds:.0f} s ({total:.0f} s so far), {peak}")

    def warn(self, text: str) -> None:
        """Print a warning above the running lines."""
        self._print(f"warning: {text}", style="yellow")

    @contextlib.contextmanager
    def download(self, title: str, size: int) -> Iterator[Bytes]:
        """Show a download, on a terminal with the bytes that came; elsewhere as one line at its beginning."""
        if not self._console.is_terminal:
            self._print(f"{'download':<14}  {title}, {decimal(size)}")
        task, received = self._progress.add_task("", total=size), 0

        def advance(count: int) -> None:
            nonlocal received
            received += count
            text = f"{'download':<14}  {title}, {decimal(received)} of {decimal(size)}"
            self._progress.update(task, description=text, completed=received)

        advance(0)
        yield advance

    def _print(self, text: str, style: str | None = None) -> None:
        # Without wrapping, so that a warning is one line of a log.
        self._console.print(text, style=style, soft_wrap=True)


def print_table(manifest: Manifest, costs: Mapping[str, ComponentCost], console: Console | None = None) -> None:
    """Print a table of the exported graphs, at most 80 columns wide."""
    table = Table(box=SIMPLE, padding=0, pad_edge=False, show_edge=False)
    for heading in ("component", "graph"):
        table.add_column(heading, no_wrap=True)
    for heading in ("nodes", "weights", "size", "memory", "gate"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, component in manifest.components.items():
        for index, (precision, graph) in enumerate(component.graphs.items()):
            # A component's graphs share its weights and its process.
            shared = _shared(manifest, component, costs[name]) if index == 0 else ("", "", "")
            table.add_row(name if index == 0 else "", precision, str(graph.nodes), *shared, _gate(graph.gate))
        for part in group_parts(component.parts):
            for index, precision in enumerate(part.precisions):
                title = f"  {part.title}" if index == 0 else ""
                nodes, gate = str(part.nodes(precision)), _gate(part.gate(precision))
                table.add_row(title, precision, nodes, "", "", "", gate)
    console = console or Console()
    console.print(table)
    console.print(_legend(manifest), soft_wrap=True)
    for line in describe_quantization(manifest.components):
        console.print(line, soft_wrap=True)


def _shared(manifest: Manifest, component: Component, cost: ComponentCost) -> tuple[str, str, str]:
    size = manifest.files[component.weights.file].size
    return (
        f"{component.weights.parameters / 1e6:.3g} M",
        decimal(size),
        _gibibytes(cost.peak_bytes),
    )


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _gate(results: tuple[GateResult, ...]) -> str:
    worst = nearest_to_bound(results)
    return f"{worst.value:.1e} ≤ {worst.bound:.1e}" if worst is not None else "none"


def _legend(manifest: Manifest) -> str:
    """Explain the columns, and the metric of each gate."""
    metrics: dict[str, list[str]] = {}
    for name, component in manifest.components.items():
        for worst in filter(None, (nearest_to_bound(graph.gate) for graph in component.graphs.values())):
            names = metrics.setdefault(_METRICS[worst.metric], [])
            names += [name] if name not in names else []
    lines = [f"  {metric}: {', '.join(names)}" for metric, names in metrics.items()]
    explained = [
        "memory: the peak of the process that exported the component",
        "gate: the largest difference from torch (parts: from the whole) and its bound",
    ]
    return "\n".join([*explained, *lines])

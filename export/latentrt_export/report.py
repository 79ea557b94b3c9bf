"""Shows an export on the command line: its progress, and a table when it is done."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Self

from rich.box import SIMPLE
from rich.filesize import decimal
from rich.table import Table

from latentrt.bundle.describe import describe_quantization, group_parts, nearest_to_bound
from latentrt.bundle.digests import ByteProgress
from latentrt.bundle.export_report import ComponentCost
from latentrt.bundle.manifest import Component, GateResult, Manifest
from latentrt.cli.console import Console
from latentrt.cli.progress import Progress, Task

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

    def __init__(self) -> None:
        self._progress = Progress(keep=True)
        self._tasks: dict[str, Task] = {}
        self._started = time.monotonic()
        self.costs: dict[str, ComponentCost] = {}

    def __enter__(self) -> Self:
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.__exit__(*exception)

    def phase(self, component: str, text: str) -> None:
        """Show the step that a component begins."""
        self._task_of(component).update(text=text)

    def done(self, component: str, record: Component, cost: ComponentCost) -> None:
        """Show that a component is finished, with its time and memory."""
        self.costs[component] = cost
        total = time.monotonic() - self._started
        self._task_of(component).finish(
            f"done in {cost.seconds:.0f} s ({total:.0f} s so far), peak memory {_gibibytes(cost.peak_bytes)}"
        )

    def _task_of(self, component: str) -> Task:
        if component not in self._tasks:
            self._tasks[component] = self._progress.task(component)
        return self._tasks[component]

    def warn(self, text: str) -> None:
        """Print a warning above the running lines."""
        self._progress.warn(text)

    @contextlib.contextmanager
    def download(self, title: str, size: int) -> Iterator[ByteProgress]:
        """Show a download, with the bytes that came."""
        task = self._progress.task("download", size, unit="bytes")
        task.say(f"{title}, {decimal(size)}")
        task.update(text=title)
        yield task.advance


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

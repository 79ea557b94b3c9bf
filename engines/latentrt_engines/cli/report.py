"""The output of the engine commands: the progress of builds, and tables of engines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import msgspec
from rich.box import SIMPLE
from rich.filesize import decimal
from rich.table import Table

from latentrt.cli.progress import Progress as Bars
from latentrt.cli.progress import Task
from latentrt.engines.record import EngineIdentity, EngineOptions
from latentrt.engines.store import StoredEngine
from latentrt_engines.build import Progress

__all__ = ["ENGINE_HEADINGS", "Reporter", "describe_target", "format_engine", "make_table"]


class Reporter(Progress):
    """Progress on stderr: a bar for each engine on a terminal, else a line for each finished engine."""

    def __init__(self) -> None:
        self._bars = Bars(keep=True)
        self._tasks: dict[str, Task] = {}

    def __enter__(self) -> Self:
        self._bars.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.__exit__(*exception)

    def update(self, component: str, text: str, fraction: float) -> None:
        task = self._task(component)
        if text.startswith("waiting"):
            task.say(text)
        task.update(fraction, text=text)

    def finish(self, component: str, engine: StoredEngine, *, built: bool) -> None:
        stats, size = engine.record.build, decimal(engine.record.plan.size)
        peak = f"{stats.peak_bytes / 2**30:.1f} GiB"
        self._task(component).finish(
            f"{size}, built in {stats.seconds:.1f} s, peak memory {peak}" if built else f"exists, {size}"
        )

    def warn(self, text: str) -> None:
        self._bars.warn(text)

    def _task(self, component: str) -> Task:
        if component not in self._tasks:
            self._tasks[component] = self._bars.task(component, 1.0)
        return self._tasks[component]


ENGINE_HEADINGS = ("key", "component", "for", "shapes", "options", "size", "built", "checked on")


def format_engine(engine: StoredEngine) -> tuple[str, ...]:
    """Return the cells of an engine under `ENGINE_HEADINGS`."""
    record, identity = engine.record, engine.record.identity
    return (
        engine.key[:12],
        f"{identity.component} {identity.precision}",
        f"{describe_target(identity)}, {identity.library} {identity.library_version}",
        str(next(iter(identity.profile.values()), "")),
        _describe_options(identity.options),
        decimal(record.plan.size) if engine.is_complete else "damaged",
        record.build.built_at[:16].replace("T", " "),
        record.check.ran_on or "not run",
    )


def _describe_options(options: EngineOptions) -> str:
    """Describe the builder options that differ from the defaults."""
    given, defaults = (msgspec.structs.asdict(each) for each in (options, EngineOptions()))
    clauses = [
        key.replace("_", " ") if value is True else f"{key.replace('_', ' ')} {value}"
        for key, value in given.items()
        if value != defaults[key]
    ]
    return ", ".join(clauses)


def describe_target(identity: EngineIdentity) -> str:
    """Describe the GPUs that a plan supports: a model, or compute capabilities."""
    return identity.gpu or ", ".join(identity.compute_capabilities)


def make_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """Return a table that is readable in a log: without a frame, and with unbroken words."""
    table = Table(box=SIMPLE, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading == "key")
    for row in rows:
        table.add_row(*row)
    return table

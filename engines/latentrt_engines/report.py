"""How is a build shown on the command line, and how are engines listed?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from latentrt.engines.record import EngineIdentity, EngineOptions
from latentrt.engines.store import StoredEngine

__all__ = ["ENGINE_HEADINGS", "Reporter", "engine_row", "option_words", "plain_table", "target_words"]


class Reporter:
    """On a terminal a bar per engine, with the phase it is in; elsewhere a line when it is there."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        columns = (
            TextColumn("{task.fields[component]:<14}"),
            BarColumn(12),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def phase(self, component: str, text: str, fraction: float) -> None:
        """Show what a component's build has come to."""
        if text.startswith("waiting") and not self._console.is_terminal:
            self._print(f"{component:<14}  {text}")
        self._progress.update(self._task(component), description=text, completed=fraction)

    def done(self, component: str, engine: StoredEngine, *, built: bool) -> None:
        """Show that a component's engine is there."""
        figures, size = engine.record.build, decimal(engine.record.plan.size)
        words = f"there already, {size}"
        if built:
            words = f"{size}, built in {figures.seconds:.1f} s, peak memory {figures.peak_bytes / 2**30:.1f} GiB"
        self._progress.update(self._task(component), description=words, completed=1.0)
        if not self._console.is_terminal:
            self._print(f"{component:<14}  {words}")

    def warn(self, text: str) -> None:
        """Print a warning above the running lines."""
        self._print(f"warning: {text}", style="yellow")

    def _task(self, component: str) -> TaskID:
        if component not in self._tasks:
            self._tasks[component] = self._progress.add_task("", total=1.0, component=component)
        return self._tasks[component]

    def _print(self, text: str, style: str | None = None) -> None:
        # Soft: a line in a log is one line, however long.
        self._console.print(text, style=style, markup=False, soft_wrap=True)


ENGINE_HEADINGS = ("key", "component", "for", "shapes", "options", "size", "built", "checked on")


def engine_row(engine: StoredEngine) -> tuple[str, ...]:
    """An engine as a row of a table."""
    record, identity = engine.record, engine.record.identity
    return (
        engine.key[:12],
        f"{identity.component} {identity.precision}",
        f"{target_words(identity)}, {identity.library} {identity.library_version}",
        str(next(iter(identity.profile.values()), "")),
        option_words(identity.options),
        decimal(record.plan.size) if engine.seems_whole else "damaged",
        record.build.built_at[:16].replace("T", " "),
        record.check.ran_on or "not run",
    )


def option_words(options: EngineOptions) -> str:
    """The options that are not the usual ones."""
    given, usual = (msgspec.structs.asdict(each) for each in (options, EngineOptions()))
    words = [
        key.replace("_", " ") if value is True else f"{key.replace('_', ' ')} {value}"
        for key, value in given.items()
        if value != usual[key]
    ]
    return ", ".join(words)


def target_words(identity: EngineIdentity) -> str:
    """Which GPUs a plan is for."""
    return identity.gpu or ", ".join(identity.compute_capabilities)


def plain_table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """A table that is read in a log too: no frame, words as they are."""
    table = Table(box=SIMPLE, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading == "key")
    for row in rows:
        table.add_row(*row)
    return table

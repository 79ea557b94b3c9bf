"""Progress of a command on stderr: bars on a terminal, else a line now and then; nothing with --quiet."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, Self

from latentrt.cli.command import settings
from latentrt.cli.output import echo, echo_error, is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from latentrt.pipeline import Pipeline
    from latentrt.resolve import ResolvedRequest
    from latentrt.sampling.schedule import Latents

__all__ = ["LINE_SECONDS", "Progress", "Task", "latents_with_progress", "transfer"]

LINE_SECONDS = 10.0
"""Least time between two lines about one task where stderr is no terminal."""

Unit = Literal["", "bytes"]


class Progress:
    """The tasks of a command, as a context manager.

    Args:
        keep: leave the bars of finished tasks on the terminal.
    """

    def __init__(self, *, keep: bool = False) -> None:
        self.quiet = settings().quiet
        self._keep = keep
        self._bars: RichProgress | None = None

    def __enter__(self) -> Self:
        # Importing the bar takes longer than a step of a small model.
        if not self.quiet and is_terminal(err=True):
            self._bars = _make_bars(self._keep)
            self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def task(self, title: str, total: float | None = None, *, unit: Unit = "") -> Task:
        """Begin a task.

        Args:
            title: what is done, such as `sampling`.
            total: amount of work; None: unknown.
            unit: of the amount.
        """
        return Task(self, self._bars, title, total, unit)

    def warn(self, text: str) -> None:
        """Print a warning above the bars, also with --quiet."""
        echo_error(f"warning: {text}")


class Task:
    """One task of a `Progress`.

    Attributes:
        title: what is done.
        total: amount of work; None: unknown.
        completed: amount done.
        text: the present step of the task; may be empty.
    """

    def __init__(
        self, progress: Progress, bars: RichProgress | None, title: str, total: float | None, unit: Unit
    ) -> None:
        self.title, self.total, self.completed, self.text = title, total, 0.0, ""
        self._progress, self._bars, self._unit = progress, bars, unit
        self._began = self._said = time.monotonic()
        self._bar: TaskID | None = None
        if bars is not None:
            self._bar = bars.add_task(title, total=total, amount="", text="")

    def advance(self, amount: float = 1) -> None:
        """Add to the amount done."""
        self.update(self.completed + amount)

    def update(self, completed: float | None = None, *, total: float | None = None, text: str | None = None) -> None:
        """Set the amount done, the total or the present step."""
        self.completed = self.completed if completed is None else completed
        self.total = self.total if total is None else total
        self.text = self.text if text is None else text
        if self._bars is not None and self._bar is not None:
            shown: dict[str, Any] = {"amount": self._amount(), "text": self.text}
            self._bars.update(self._bar, completed=self.completed, total=self.total, **shown)
        elif not self._progress.quiet and time.monotonic() - self._said >= LINE_SECONDS:
            self.say(", ".join(each for each in (self._amount(), self.text, self._times()) if each))

    def finish(self, text: str = "") -> None:
        """End the task; a text is the last step on a terminal, and a line elsewhere."""
        if self.total is None:
            self.total = 1.0
        if text and self._bars is None:
            self.say(text)
        self._said = time.monotonic()
        self.update(self.total, text=text)

    def say(self, text: str) -> None:
        """Print a line about the task where there is no bar."""
        if self._bars is None and not self._progress.quiet:
            self._said = time.monotonic()
            echo(f"{self.title:<14}  {text}", err=True)

    def _amount(self) -> str:
        if self._unit == "bytes":
            from rich.filesize import decimal

            whole = "" if self.total is None else f" of {decimal(int(self.total))}"
            return f"{decimal(int(self.completed))}{whole}"
        if self.total is None or self.total <= 1:  # steps without a number
            return ""
        return f"{int(self.completed)} of {self.total:g}"

    def _times(self) -> str:
        seconds = time.monotonic() - self._began
        left = seconds / self.completed * (self.total - self.completed) if self.completed and self.total else None
        return f"{_clock(seconds)} so far" + (f", about {_clock(left)} left" if left else "")


def latents_with_progress(pipeline: Pipeline, request: ResolvedRequest) -> Latents:
    """Return the latents after the last step, with their progress."""
    with Progress() as progress:
        if progress.quiet:
            return deque(pipeline.steps(request), maxlen=1)[0].latents
        task = progress.task("sampling")
        for step in pipeline.steps(request):
            task.update(step.index + 1, total=step.total)
    return step.latents


@contextmanager
def transfer(title: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show a transfer of `size` bytes within the block, which calls the result with the number of bytes that came."""
    with Progress() as progress:
        yield progress.task(title, size, unit="bytes").advance


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _make_bars(keep: bool) -> RichProgress:
    from rich.progress import BarColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    from latentrt.cli.console import Console, PlainColumn

    columns = (
        PlainColumn("{task.description:<14}"),
        BarColumn(24),
        PlainColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        PlainColumn("{task.fields[text]}"),
    )
    return RichProgress(*columns, console=Console(err=True), transient=not keep)

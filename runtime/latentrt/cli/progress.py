"""Progress of a generation at a terminal."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from latentrt.cli.output import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress

    from latentrt.pipeline import Pipeline
    from latentrt.resolve import ResolvedRequest
    from latentrt.sampling.schedule import Latents

__all__ = ["latents_with_progress", "progress_bar"]


def latents_with_progress(pipeline: Pipeline, request: ResolvedRequest, *, quiet: bool) -> Latents:
    """Return the latents after the last step; a bar shows the progress where stderr is a terminal."""
    # Importing the bar takes longer than a step of a small model.
    if quiet or not is_terminal(err=True):
        return deque(pipeline.steps(request), maxlen=1)[0].latents
    with progress_bar() as progress:
        task = progress.add_task("", total=None)
        for step in pipeline.steps(request):
            progress.update(task, total=step.total, completed=step.index + 1)
    return step.latents


def progress_bar(*, quiet: bool = False) -> Progress:
    """Return a progress bar on stderr, which is disabled unless stderr is a terminal.

    Args:
        quiet: disable it on a terminal as well.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from latentrt.cli.console import Console, PlainColumn

    columns = (PlainColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(err=True)
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True)

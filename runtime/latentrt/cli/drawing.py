"""How does a person at a terminal see that a picture is being drawn?"""

from __future__ import annotations

import sys
from collections import deque
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from latentrt.pipeline import Pipeline
    from latentrt.request import Order

__all__ = ["drawing_progress", "latents_with_progress"]


def latents_with_progress(pipeline: Pipeline, order: Order, *, quiet: bool) -> Any:
    """The latents after the last step, with a bar that says how far it is."""
    # Importing what draws a bar takes longer than a step of a small model.
    if quiet or not sys.stderr.isatty():
        return deque(pipeline.steps(order), maxlen=1)[0].latents
    with drawing_progress(quiet=quiet) as progress:
        task = progress.add_task("", total=None)
        for step in pipeline.steps(order):
            progress.update(task, total=step.total, completed=step.index + 1)
    return step.latents


def drawing_progress(*, quiet: bool) -> Progress:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True)

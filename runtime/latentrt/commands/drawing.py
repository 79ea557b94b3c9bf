"""How does a person at a terminal see that a picture is being drawn?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentrt.pipeline import Pipeline
    from latentrt.request import Order

__all__ = ["latents_with_progress"]


def latents_with_progress(pipeline: Pipeline, order: Order, *, quiet: bool) -> Any:
    """The latents after the last step; a bar on stderr, where that is a terminal, says how far it is."""
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
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=None)
        for step in pipeline.steps(order):
            progress.update(task, total=step.total, completed=step.index + 1)
    return step.latents

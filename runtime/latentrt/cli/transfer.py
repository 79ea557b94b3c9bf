"""Progress of a transfer or of hashing, in bytes: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from latentrt.cli.command import settings
from latentrt.cli.console import Console, PlainColumn
from latentrt.cli.output import echo

__all__ = ["transfer"]

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def transfer(title: str, size: int) -> Iterator[Callable[[int], None]]:
    """Show a transfer of `size` bytes on stderr within the block, which calls the result with the bytes that came."""
    console = Console(err=True)
    if settings().quiet:
        yield lambda count: None
    elif console.is_terminal:
        columns = (PlainColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=size)
            yield lambda count: progress.advance(task, count)
    else:
        yield _make_line_printer(title, size)


def _make_line_printer(title: str, size: int) -> Callable[[int], None]:
    received, shown_at = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal received, shown_at
        received += count
        if time.monotonic() - shown_at >= _SECONDS_BETWEEN_LINES:
            shown_at = time.monotonic()
            echo(f"{title}: {decimal(received)} of {decimal(size)}", err=True)

    return advance

"""Warnings that reach the user of an export from wherever they arise: `warn` gives one, `relay_warnings` reports it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TextIO

__all__ = ["ExportWarning", "relay_warnings", "warn"]


class ExportWarning(UserWarning):
    """A fault of the checkpoint that does not stop the export."""


def warn(text: str) -> None:
    """Warn the user of the export.

    Warns:
        ExportWarning: always.
    """
    warnings.warn(text, ExportWarning, stacklevel=2)


@contextlib.contextmanager
def relay_warnings(report: Callable[[str], None]) -> Iterator[None]:
    """Report the text of each `ExportWarning` inside the context, each once; other warnings are shown as usual."""
    seen: set[str] = set()
    with warnings.catch_warnings():
        show = warnings.showwarning

        def relay(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if not issubclass(category, ExportWarning):
                show(message, category, filename, lineno, file, line)
            elif str(message) not in seen:
                seen.add(str(message))
                report(str(message))

        warnings.simplefilter("always", ExportWarning)
        warnings.showwarning = relay
        yield

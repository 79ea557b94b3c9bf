"""Tables and progress bars of the command line, by rich, as `latentrt.cli.output` prints them: everything is escaped.

rich reads `[…]` in a plain string as markup and passes terminal escapes on. Here a string is neither; only `Text`
objects are printed as they are.
"""

from __future__ import annotations

from typing import IO, Any, cast

from rich import console as rich_console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from latentrt.bundle.printable import printable
from latentrt.cli.output import Stream

__all__ = ["Console", "PlainColumn"]


class Console(rich_console.Console):
    """rich's console without markup, emoji codes and highlighting, in which each plain string is escaped.

    Args:
        err: print to standard error.
        pipe_columns: the width where the stream is no terminal; None: rich's own choice.
        options: of rich's console.
    """

    def __init__(self, *, err: bool = False, pipe_columns: int | None = None, **options: Any) -> None:
        file = cast("IO[str]", Stream(err=err, bound=True))
        super().__init__(**{"file": file, "markup": False, "emoji": False, "highlight": False, **options})
        if pipe_columns is not None and not self.is_terminal:
            self.width = pipe_columns

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as text: rich calls this for each plain string, in tables too."""
        layout = {key: options[key] for key in ("style", "justify", "overflow") if options.get(key)}
        return Text(printable(text, keep="\n"), **layout)


class PlainColumn(ProgressColumn):
    """A column of a progress bar with a text of unknown origin.

    Args:
        template: the text as `str.format` reads it; `task` is the bar's task.
    """

    def __init__(self, template: str) -> None:
        self._template = template
        super().__init__()

    def render(self, task: Task) -> Text:
        """Return the text of a task."""
        return Text(printable(self._template.format(task=task)))

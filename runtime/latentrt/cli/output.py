"""The one place where the command line prints.

Text that comes from a file or a caller may contain terminal escapes, characters that the stream's encoding lacks, or
half a surrogate pair. `echo` and `echo_block` escape the first, replace the others, and never end a command because the
reader of a pipe is gone. Everything else that reaches a terminal goes through them: errors, warnings, log records, JSON
and, by `latentrt.cli.console`, rich's tables and progress bars.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from typing import Any, TextIO

import click

from latentrt.bundle.printable import printable
from latentrt.errors import OutputError

__all__ = [
    "Stream",
    "echo",
    "echo_block",
    "echo_bytes",
    "echo_error",
    "echo_json",
    "echo_json_text",
    "echo_traceback",
    "is_terminal",
    "redirect_warnings",
    "set_log_level",
]

_MAX_ERROR = 4000  # characters
# Signs of our own output for streams that have ASCII or one byte per character only.
_PLAIN_SIGNS = {
    "×": "x",
    "…": "...",
    "≤": "<=",
    "≥": ">=",
    "−": "-",
    "–": "-",
    "→": "->",
    "≈": "~",
    "✓": "ok",
    "━": "-",
}


class Stream:
    """Standard output or standard error, as a file that survives a closed pipe.

    Characters that the stream's encoding lacks are replaced.

    Args:
        err: standard error in place of standard output.
        bound: keep writing to the present file of the stream after `sys.stdout` or `sys.stderr` is replaced. rich's
            live displays need this: they replace both by files that write to their console.
    """

    def __init__(self, *, err: bool = False, bound: bool = False) -> None:
        self._err = err
        self._bound = self._current if bound else None

    @property
    def _current(self) -> TextIO | None:
        # None where the descriptor was closed.
        return sys.stderr if self._err else sys.stdout

    @property
    def _file(self) -> TextIO | None:
        return self._current if self._bound is None else self._bound

    @property
    def encoding(self) -> str:
        """The encoding of the text; UTF-8 where the stream names none."""
        return getattr(self._file, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._file is not None and self._file.isatty()

    def write(self, text: str) -> int:
        """Write a text and flush it.

        Raises:
            OutputError: standard output cannot be written, as on a full disk. Nothing is raised for standard error or
                for a pipe whose reader is gone; further output is then lost.
        """
        if self._file is None:
            return len(text)
        encoding = self.encoding
        with self._losing_output():
            self._file.write(text.encode(encoding, "latentrt.replace").decode(encoding))
            self._file.flush()
        return len(text)

    @contextlib.contextmanager
    def _losing_output(self) -> Iterator[None]:
        """Redirect the stream to the null device if it cannot be written to within the block."""
        try:
            yield
        except OSError as error:
            self._mute()
            if not self._err and not isinstance(error, BrokenPipeError):
                raise OutputError(
                    f"standard output cannot be written: {error.strerror}; redirect it to a file"
                ) from None

    def write_bytes(self, data: bytes) -> None:
        """Write bytes, which nothing escapes, and flush them.

        Raises:
            OutputError: as `write`.
        """
        if self._file is not None:
            with self._losing_output():
                self._file.buffer.write(data)
                self._file.buffer.flush()

    def flush(self) -> None:
        """Do nothing: `write` flushes."""

    def _mute(self) -> None:
        """Redirect the stream to the null device, so that neither a later write nor the last flush at exit fails."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._file.fileno())  # type: ignore[union-attr]  # None was excluded
            os.close(null)


def echo(text: str = "", *, err: bool = False, bold: str = "") -> None:
    """Print one line; a newline in it is escaped as other control characters are.

    Args:
        err: print to standard error.
        bold: the beginning of the line, in bold where the stream is a terminal.
    """
    start = click.style(printable(bold), bold=True) if bold else ""
    click.echo(f"{start}{printable(text)}", file=Stream(err=err))  # type: ignore[arg-type]  # a file as far as click uses it


def echo_block(text: str, *, err: bool = False) -> None:
    """Print a text of several lines; all control characters but newlines are escaped."""
    click.echo(printable(text.removesuffix("\n"), keep="\n"), file=Stream(err=err))  # type: ignore[arg-type]


def echo_error(text: str) -> None:
    """Print an error or a warning to standard error. Lines after the first are indented, so none passes as another.

    A text of more than `_MAX_ERROR` characters, as a path or a key of a file may be, is cut in its middle.
    """
    if len(text) > _MAX_ERROR:
        text = f"{text[: _MAX_ERROR // 2]} … {text[-_MAX_ERROR // 2 :]}"
    first, *others = text.split("\n")
    echo_block(
        "\n".join([first, *(line if not line or line.startswith("  ") else f"  {line}" for line in others)]), err=True
    )


def echo_bytes(data: bytes) -> None:
    """Write bytes to standard output for another program, such as an image."""
    Stream().write_bytes(data)


def echo_json(value: Any) -> None:
    """Print a value as JSON in ASCII: a terminal interprets none of it, and half a surrogate pair survives."""
    echo_json_text(json.dumps(value, indent=2))


def echo_json_text(text: str) -> None:
    """Print a text that is JSON, in ASCII."""
    # `dumps` escapes all of these but DEL.
    escaped = re.sub(r"[^\n -~]", lambda found: json.dumps(found[0])[1:-1].replace("\x7f", "\\u007f"), text)
    echo_block(escaped)


def is_terminal(*, err: bool = False) -> bool:
    """Return whether standard output, or standard error, is a terminal."""
    return Stream(err=err).isatty()


def set_log_level(level: int) -> None:
    """Print the records of the logger `latentrt` from this level on, and those of others from level warning.

    It holds until the end of the `redirect_warnings` block.
    """
    logging.getLogger("latentrt").setLevel(level)
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _LogHandler):
            handler.setLevel(level)


@contextlib.contextmanager
def redirect_warnings() -> Iterator[None]:
    """Print Python's warnings, and log records from level warning, through this module within the block."""
    _open_closed_streams()
    handler, root, shown = _LogHandler(logging.WARNING), logging.getLogger(), warnings.showwarning
    root.addHandler(handler)
    for stream in (sys.stdout, sys.stderr):  # for click's own help, which is printed without `echo`
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors="latentrt.replace")  # type: ignore[union-attr]
    if shown is _PYTHONS_SHOWWARNING:  # not in a test that records warnings
        warnings.showwarning = _show_warning
    own_level = logging.getLogger("latentrt").level
    try:
        yield
    finally:
        root.removeHandler(handler)
        logging.getLogger("latentrt").setLevel(own_level)
        if warnings.showwarning is _show_warning:
            warnings.showwarning = shown


_PYTHONS_SHOWWARNING = warnings.showwarning


class _LogHandler(logging.Handler):
    """Prints log records as `echo_error` does."""

    def emit(self, record: logging.LogRecord) -> None:
        echo_error(self.format(record))


def _show_warning(message: Warning | str, category: type[Warning], *where: object, **others: object) -> None:
    echo_error(f"{category.__name__}: {message}")


def echo_traceback(error: BaseException) -> None:
    """Print the traceback of an error to standard error."""
    echo_block("".join(traceback.format_exception(error)), err=True)


def _open_closed_streams() -> None:
    """Open the null device for each standard stream that is closed, or the next file would get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _replace(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks: by a plain sign, or escaped as Python writes them."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    escaped = (sign.encode("ascii", "backslashreplace").decode("ascii") for sign in lacking)
    return "".join(_PLAIN_SIGNS.get(sign, text) for sign, text in zip(lacking, escaped, strict=True)), error.end


codecs.register_error("latentrt.replace", _replace)

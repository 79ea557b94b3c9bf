"""The output layer: escapes everything, replaces what an encoding lacks, and outlives its reader."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
from rich.progress import Progress
from rich.table import Table

from latentrt.cli import output
from latentrt.cli.console import Console, PlainColumn
from latentrt.errors import OutputError

# A title that a terminal would set, markup of rich, a change of direction, half a surrogate pair, NUL, a C1 control.
HOSTILE = "\x1b]0;x\x07[red][/]\u202e\ud800\0\x9b"
ESCAPED = "\\x1b]0;x\\x07[red][/]\\u202e\\ud800\\x00\\x9b"


class Pipe(io.StringIO):
    """A stream of a given encoding that is no terminal, and that may fail."""

    encoding = "utf-8"
    failure: OSError | None = None

    def write(self, text: str) -> int:
        if self.failure is not None:
            raise self.failure
        text.encode(self.encoding)  # fails as a real stream does
        return super().write(text)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Pipe:
    """Standard output and standard error, replaced."""
    stream = Pipe()
    # Not in `sys`, whose streams pytest sets again for each phase of a test.
    monkeypatch.setattr(output, "sys", SimpleNamespace(stdout=stream, stderr=stream))
    return stream


def test_a_line_stays_one_line_and_is_escaped(pipe: Pipe) -> None:
    output.echo(f"a\nb\r{HOSTILE}", bold="\x1b[1m")
    assert pipe.getvalue() == f"\\x1b[1ma\\nb\\r{ESCAPED}\n"


def test_a_block_keeps_its_newlines_alone(pipe: Pipe) -> None:
    output.echo_block(f"a\nb\t{HOSTILE}\n", err=True)
    assert pipe.getvalue() == f"a\nb\\t{ESCAPED}\n"


def test_no_line_of_an_error_passes_as_another(pipe: Pipe) -> None:
    output.echo_error("error: no file x\nerror: pay here\n\n  indented")
    assert pipe.getvalue() == "error: no file x\n  error: pay here\n\n  indented\n"


def test_a_long_error_keeps_its_beginning_and_its_end(pipe: Pipe) -> None:
    output.echo_error(f"error: got {'a' * 100_000}, expected less; cut it")
    assert len(pipe.getvalue()) < 4010
    assert re.fullmatch(r"error: got a+ … a+, expected less; cut it\n", pipe.getvalue())


def test_json_is_ascii_and_reads_back(pipe: Pipe) -> None:
    value = {HOSTILE: [f"\x7f{HOSTILE}😀", 1.5, None]}
    output.echo_json(value)
    assert set(pipe.getvalue()) <= {"\n", *map(chr, range(32, 127))}
    assert json.loads(pipe.getvalue()) == value
    output.echo_json_text('{"a": "é\u202e\x7f"}')
    assert json.loads(pipe.getvalue().splitlines()[-1]) == {"a": "é\u202e\x7f"}


def test_tables_and_bars_are_escaped_and_without_markup(pipe: Pipe) -> None:
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    console = Console(pipe_columns=200)
    console.print(table)
    console.print(f"{HOSTILE} :smile: [/]", soft_wrap=True)
    with Progress(PlainColumn("{task.description}"), console=Console(err=True, force_terminal=True)) as bar:
        bar.add_task(HOSTILE, total=1)
        bar.refresh()
        output.echo("above the bar", err=True)  # rich replaces the streams while a bar is shown
    printed = pipe.getvalue()
    assert printed.count(ESCAPED) >= 4
    assert "above the bar" in printed
    assert ":smile: [/]" in printed
    assert not any(sign in printed for sign in ("\x07", "\u202e", "\x9b", "\0", "\x1b]0"))


@pytest.mark.parametrize(
    ("encoding", "printed"),
    [("cp1252", "\\u732b 8 × 8 …"), ("ascii", "\\u732b 8 x 8 ..."), ("utf-8", "猫 8 × 8 …")],
)
def test_what_an_encoding_lacks_is_replaced(pipe: Pipe, encoding: str, printed: str) -> None:
    pipe.encoding = encoding
    output.echo("猫 8 × 8 …")
    Console().print("猫 8 × 8 …")
    assert pipe.getvalue() == f"{printed}\n" * 2


def test_a_pipe_without_a_reader_is_no_error(pipe: Pipe) -> None:
    pipe.failure = BrokenPipeError(32, "Broken pipe")
    output.echo("a")
    output.echo("b", err=True)


def test_a_full_disk_is_an_error_of_standard_output_alone(pipe: Pipe) -> None:
    pipe.failure = OSError(28, "No space left on device")
    with pytest.raises(OutputError):
        output.echo("a")
    output.echo("b", err=True)


def test_closed_streams_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "sys", SimpleNamespace(stdout=None, stderr=None))
    output.echo("a")
    output.echo_error("b")
    Console(err=True).print("c")
    assert not output.is_terminal()


def test_warnings_and_log_records_are_escaped(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest's own handlers would keep the record, and cannot send half a surrogate pair to another process.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = output._PYTHONS_SHOWWARNING
        with output.redirect_warnings():
            warnings.warn(f"read {HOSTILE}", stacklevel=1)
            logging.getLogger("latentrt").warning("wrote %s", f"\n{HOSTILE}")
    assert pipe.getvalue() == f"UserWarning: read {ESCAPED}\nwrote \n  {ESCAPED}\n"


def test_the_process_ends_as_usual_without_a_reader_or_a_stream() -> None:
    """In a process of its own, where the interpreter flushes its streams and the numbers of closed files are reused."""
    code = (
        "import os, sys\nfrom latentrt.cli.output import echo, redirect_warnings\n"
        "with redirect_warnings():\n    echo('a' * 100_000)\n    echo('b')\n"
        "    assert open(os.devnull).fileno() > 2\n    sys.exit(0)"
    )
    reading, writing = os.pipe()
    os.close(reading)
    broken = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (broken.returncode, broken.stderr) == (0, b"")
    closed = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" >&- 2>&-', sys.executable, code], check=False, capture_output=True
    )
    assert closed.returncode == 0

"""Configuration files that are not TOML, are too large, or set options to values that they do not take.

A case is the content of a file. `latentrt config`, which reads every table and each value, and a command that takes its
defaults from the file, must succeed or print an error of ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import click

from latentrt.cli.config import list_commands
from latentrt.cli.config_file import MAX_CONFIG_BYTES
from latentrt.cli.main import _group
from latentrt.errors import LatentRTError
from tests.attack.command_line import find_error

__all__ = ["Case", "cases", "run"]

Case = bytes
_VALUES = (
    *('""', '"x"', '"\\u001b]0;x\\u0007"', '"\\u202e"', '"a\\u0000b"', f'"{"a" * 30_000}"', '"../../x"', '"1e999"'),
    *("true", "0", "-1", "1", "9223372036854775808", f"0x{'f' * 20_000}", "1e308", "inf", "nan", "2026-01-31"),
    *("[]", "[[]]", '["x", 1]', "{}", "{ a = 1 }", '{ "\\u001b" = "=" }', "{ a = { b = inf } }"),
)
"""Wrong values of most options, as TOML writes them."""


def cases() -> Iterator[tuple[str, Case]]:
    """Yield every case."""
    yield from _raw().items()
    for context, command in list_commands(click.Context(_group, info_name="latentrt"), every=True):
        table = ".".join(context.command_path.split()[1:])
        for option in command.params:
            for value in _VALUES:
                key = max(option.opts, key=len).lstrip("-")
                yield f"{table}.{key}={value[:30]}", f"[{table}]\n{json.dumps(key)} = {value}\n".encode()


def run(case: Case, folder: Path) -> LatentRTError | None:
    """Read a file with two commands.

    Raises:
        AssertionError: a command ended otherwise than with an error of ours, or its text could control a terminal.
    """
    path = folder / "config.toml"
    path.write_bytes(case)
    with mock.patch.dict(os.environ, LATENTRT_CONFIG=str(path)):
        return find_error("config") or find_error("samplers")


def _raw() -> dict[str, bytes]:
    """Return files that are no configuration at all, or cost a parser much."""
    size = MAX_CONFIG_BYTES
    return {
        "empty": b"",
        "a mark of byte order": b"\xef\xbb\xbf[run]\nsteps = 3\n",
        "UTF-16": "[run]\nsteps = 3\n".encode("utf-16"),
        "not UTF-8": b'[run]\nsampler = "\xff"\n',
        "NULs": bytes(1000),
        "a surrogate": b'[run]\nsampler = "\\ud800"\n',
        "JSON": b'{"run": {"steps": 3}}',
        "one byte too many": b"#" * (size + 1),
        "100 MB": b"#" * 100_000_000,
        "many tables": b"".join(b"[t%d]\n" % index for index in range(3000)),
        "a deep table": b"[" + b".".join([b"a"] * (size // 2 - 10)) + b"]\n",
        "a deep table of a command": b"[" + b".".join([b"run"] * 8000) + b"]\n",
        "a deep key": b".".join([b"run"] * 8000) + b" = 1\n",
        "deep arrays": b"x = " + b"[" * 15_000 + b"]" * 15_000,
        "deep tables in a line": b"x = " + b"{a=" * 8_000 + b"1" + b"}" * 8_000,
        "an array of tables": b"[[run]]\n" * 4000,
        "many keys of one table": b"[run]\n" + b"".join(b"k%d=1\n" % index for index in range(4000)),
        "many dotted keys": b"".join(b"run.a%d.b=1\n" % index for index in range(2000)),
        "a table twice": b"[run]\nsteps = 3\n[run]\nsteps = 4\n",
        "a key twice": b"[run]\nsteps = 3\nsteps = 4\n",
        "an option by two names": b"[run]\nsampler-option = { a = 1 }\nsampler_option = { a = 2 }\n",
        "a command that has a value": b"run = 3\n",
        "a command in a command": b"[run.run]\nsteps = 3\n",
        "a group with an option": b"[engines]\njson = true\n",
        "a name that moves the cursor": b'["\\u001b[2J"]\nx = 1\n',
        "a key that moves the cursor": b'[run]\n"\\u001b[2J" = 1\n',
        "a key of 30,000 signs": b'[run]\n"' + b"a" * 30_000 + b'" = 1\n',
        "a table of 30,000 signs": b"[" + b"a" * 30_000 + b"]\n",
        "a number of 30,000 digits": b"[run]\nsteps = " + b"9" * 30_000 + b"\n",
        "a binary number of 30,000 digits": b"[run]\nsteps = 0b" + b"1" * 30_000 + b"\n",
        "an open text": b'[run]\nsampler = "',
        "open texts": b'x = """' + b'\\"""' * 7000,
        "no value": b"[run]\nsteps =\n",
        "an environment variable": b"[run]\nsampler = '$HOME'\n",
    }

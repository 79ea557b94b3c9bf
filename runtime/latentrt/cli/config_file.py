"""The configuration file: defaults of options, in TOML, with a table for each command.

    [run]
    steps = 20
    guidance-scale = 5.5

    [engines.list]
    json = true

The file is `config.toml` in the user's configuration folder; the environment variable LATENTRT_CONFIG names another. A
key is an option's name without its dashes. A value is that which would be typed; an array for an option that may be
repeated, true or false for an option without a value. An empty text is no value.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from latentrt.bundle.printable import did_you_mean, quote
from latentrt.errors import RequestError

__all__ = ["MAX_CONFIG_BYTES", "config_path", "read_config", "refuse_table", "table_values"]

MAX_CONFIG_BYTES = 1 << 15  # a file with every option of every command has 21 kB; tomllib's time grows with the square
_MAX_DOTS = 256  # in a line: a key of 8,000 dotted names takes tomllib 17 s


def config_path() -> Path:
    """Return the path of the configuration file, which may not exist."""
    if chosen := os.environ.get("LATENTRT_CONFIG"):
        return Path(chosen)
    import platformdirs

    return platformdirs.user_config_path("latentrt", appauthor=False) / "config.toml"


def read_config() -> dict[str, Any]:
    """Read the configuration file; return its tables by command, {} without a file.

    Raises:
        RequestError: the file cannot be read, is larger than `MAX_CONFIG_BYTES`, or is not TOML; or the one that
            LATENTRT_CONFIG names does not exist.
    """
    path = config_path()
    # `Path.exists` would raise for a folder that this user may not enter, as with sudo.
    if not os.environ.get("LATENTRT_CONFIG") and not os.path.exists(path):
        return {}
    from latentrt.bundle.digests import open_regular, read_at_most

    try:
        with open_regular(path) as stream:
            data = read_at_most(stream, MAX_CONFIG_BYTES)
    except OSError as error:
        chosen = ", which LATENTRT_CONFIG names," if os.environ.get("LATENTRT_CONFIG") else ""
        raise RequestError(
            f"the configuration file {path}{chosen} cannot be read: {error.strerror}; latentrt config init writes one"
        ) from None
    if len(data) > MAX_CONFIG_BYTES:
        raise RequestError(f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes, expected a configuration file")
    if any(line.count(b".") > _MAX_DOTS for line in data.split(b"\n")):
        raise RequestError(
            f"{path} has a line with more than {_MAX_DOTS} dots, expected fewer; write each value of a list on its "
            "own line"
        )
    import tomllib

    try:
        return tomllib.loads(data.decode("utf-8-sig"))  # Windows' editors write the mark
    except (ValueError, RecursionError) as error:
        problem = "its values are nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"{path} is not TOML: {problem}; correct it, or see latentrt config init") from None


def table_values(
    tree: Mapping[str, Any], names: Sequence[str], commands: Collection[str], command: click.Command
) -> dict[str, Any]:
    """Return the values of a command's table, by the names of its parameters.

    Args:
        tree: the file.
        names: of the command, such as `("engines", "list")`.
        commands: the names of all commands, which are the tables that the file may have.
        command: whose options the keys are.

    Raises:
        RequestError: a table or key does not exist, or a value has a type that cannot be typed.
    """
    path = config_path()
    for name, value in tree.items():
        if name not in commands:
            raise refuse_table((name,), value, commands)
    table: Any = tree
    for depth, name in enumerate(names, 1):
        table = table.get(name, {})
        if not isinstance(table, dict):
            raise RequestError(f"{path}: got {quote(table)} as {name}, expected a table: [{'.'.join(names[:depth])}]")
    values, seen = dict[str, Any](), dict[click.Option, str]()
    for key, value in table.items():
        option, where = _find_option(command, key), f"{key} in [{'.'.join(names)}] of {path}"
        if option is None:
            known = [flag for each in command.params for flag in _keys_of(each)]
            raise RequestError(f"{where}: got an unknown key, expected an option's name{did_you_mean(key, known)}")
        if option in seen:
            raise RequestError(f"{where}: got the same option as {seen[option]}, expected one of the two")
        seen[option] = key
        if value != "":  # no value, as with an environment variable
            values[option.name or ""] = _as_typed(option, value, where)
    return values


def refuse_table(names: Sequence[str], value: Any, commands: Collection[str]) -> RequestError:
    """Return the error about a table that is no command's, or about a key outside of one.

    Args:
        names: of the table or key, from the file's top.
        value: its value.
        commands: names that tables may have.
    """
    place = ".".join(names)
    if isinstance(value, dict):
        return RequestError(
            f"{config_path()}: got the table [{place}], expected that of a command{did_you_mean(place, commands)}"
        )
    group = ".".join(names[:-1])
    where = f"in [{group}], which has commands of its own" if group else "outside of a table"
    example = min(each for each in commands if each.startswith(f"{group}.")) if group else "run"
    return RequestError(
        f"{config_path()}: got {quote(names[-1])} {where}, expected it in the table of a command, such as [{example}]"
    )


def _find_option(command: click.Command, key: str) -> click.Option | None:
    """Return the option that a key sets, None if there is none."""
    name = key.replace("_", "-")
    return next((each for each in command.params if isinstance(each, click.Option) and name in _keys_of(each)), None)


def _keys_of(parameter: click.Parameter) -> list[str]:
    return [flag.removeprefix("--") for flag in parameter.opts if flag.startswith("--")]


def _as_typed(option: click.Option, value: Any, where: str) -> Any:
    """Return a value of the file as the command line would give it: text, or a list of texts."""
    if option.multiple:
        if isinstance(value, dict):  # of NAME=VALUE
            return [
                f"{name}={each if isinstance(each, str) else _as_json(each, f'{name} of {where}')}"
                for name, each in value.items()
            ]
        return [_as_text(option, each, where) for each in (value if isinstance(value, list) else [value])]
    return _as_text(option, value, where)


def _as_json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, default=str)
    except ValueError:  # a hexadecimal number of any length is TOML; Python writes none of more than 4,300 digits
        raise RequestError(f"{where}: got {quote(value)}, expected numbers of 64 bits") from None


def _as_text(option: click.Option, value: Any, where: str) -> str | bool:
    if option.is_flag:
        if not isinstance(value, bool):
            raise RequestError(f"{where}: got {quote(value)}, expected true or false")
        return value
    is_plain = isinstance(value, str | float) or (isinstance(value, int) and abs(value) < 1 << 63)
    if isinstance(value, bool) or not is_plain or "\0" in str(value):  # NUL, as an environment variable has none
        raise RequestError(f"{where}: got {quote(value)}, expected a text or a number")
    return str(value)

"""The command `latentrt config`: prints the values of options that are set, and writes a configuration file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Literal

import click
import msgspec
from click.core import ParameterSource

from latentrt.cli.command import Command, argument, command, describe_usage, flag_of, option, settings, spell
from latentrt.cli.config_file import config_path, read_config, refuse_table
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo
from latentrt.errors import OutputError, RequestError

__all__ = ["ConfigDocument", "config", "list_commands", "template"]

Source = Literal["environment", "file", "default"]


class ConfigValue(msgspec.Struct, frozen=True, kw_only=True):
    """The value of an option where the command line does not set it.

    Attributes:
        command: such as `engines list`. key: of the option, such as `guidance-scale`.
        value: as it would be typed.
        source: where it is set. name: of the environment variable; null for another source.
    """

    command: str
    key: str
    value: str
    source: Source
    name: str | None


class ConfigDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt config --json`.

    Attributes:
        path: of the configuration file. exists: whether it does.
        values: that are set; with --all, also the defaults.
    """

    path: str
    exists: bool
    values: list[ConfigValue]


@command(
    examples=(
        "latentrt config",
        "latentrt config init    # writes a file in which every option is commented out",
        "latentrt config --all",
    ),
    uses_file=False,
)
@argument("action", type=click.Choice(["show", "init"]), default="show", required=False)
@option("--all", "everything", is_flag=True, help="Also print the options that have their defaults.")
@click.pass_context
def config(context: click.Context, action: str, everything: bool) -> None:
    """Print the path of the configuration file, and each option that it or the environment sets; or write a file in
    which every option is commented out (`init`).

    The file is TOML: a table for each command, a key for each option without its dashes. An option's value is, in this
    order, that of the command line, of the environment variable, of the file, the default. The environment variable
    LATENTRT_CONFIG names another file.

    \b
      [run]
      steps = 20
      guidance-scale = 5.5
      sampler-option = { solver_order = 3 }
    \b
      [engines.list]
      json = true
    """
    path, root = config_path(), context.find_root()
    if action == "init":
        _write(template(root))
    values = list(_find_values(root, read_config(), everything=everything)) if action == "show" else []
    document = ConfigDocument(path=str(path), exists=os.path.exists(path), values=values)
    if settings().json:
        echo_document(document)
    elif action == "init":
        echo(f"{path}: written; remove the # before a line to set an option")
    else:
        _print(document)


def _print(document: ConfigDocument) -> None:
    echo(f"file: {document.path}{'' if document.exists else ' (does not exist; latentrt config init writes it)'}")
    sources = {"file": "the file", "default": "default"}
    heading = None
    for each in document.values:
        if each.command != heading:
            echo()
            echo(f"[{each.command.replace(' ', '.')}]")
            heading = each.command
        echo(f"{each.key + ' = ' + each.value:<48}  {each.name or sources[each.source]}")
    if not document.values:
        echo("no option is set in it or in the environment")


def list_commands(root: click.Context, *, every: bool = False) -> Iterator[tuple[click.Context, Command]]:
    """Yield the commands whose options the file may set, with a context in which these can be resolved.

    Args:
        root: of the group, whose groups are included.
        every: yield the other commands too.
    """
    group = root.command
    assert isinstance(group, click.Group)
    for name in group.list_commands(root):
        found = group.get_command(root, name)
        assert found is not None, "it is listed"
        context = click.Context(found, root, info_name=name)
        if isinstance(found, click.Group):
            yield from list_commands(context, every=every)
        elif isinstance(found, Command) and (every or found.uses_file):
            yield context, found


def _find_values(root: click.Context, tree: dict[str, Any], *, everything: bool) -> Iterator[ConfigValue]:
    """Yield the value of each option that the file or the environment sets.

    Raises:
        RequestError: a table, a key or a value is wrong.
    """
    commands = list(list_commands(root))
    _check_tables(tree, {tuple(context.command_path.split()[1:]) for context, _ in commands})
    sources: dict[Any, Source] = {ParameterSource.ENVIRONMENT: "environment", ParameterSource.DEFAULT_MAP: "file"}
    for context, found in commands:
        found.read_file(context)
        found.check_variables()
        for each in found.params:
            if not isinstance(each, click.Option):
                continue
            try:
                given, _ = each.handle_parse_result(context, {}, [])
            except click.MissingParameter:
                continue
            except click.UsageError as error:
                raise RequestError(describe_usage(error)) from None
            source = sources.get(context.get_parameter_source(each.name or ""), "default")
            if source != "default":
                _check_request_option(context, each, given)
            variable = spell(context, each) if source == "environment" else None
            if variable is not None:
                value: Any = os.environ[variable]
            elif source == "file":
                value = (context.default_map or {})[each.name or ""]
            elif not everything or (value := each.get_default(context)) is None:
                continue
            yield ConfigValue(
                command=" ".join(context.command_path.split()[1:]),
                key=flag_of(each).removeprefix("--"),
                value=_as_text(value),
                source=source,
                name=variable,
            )


def _check_request_option(context: click.Context, option: click.Option, value: Any) -> None:
    """Check the value of an option of a request, as far as no bundle is needed.

    Raises:
        RequestError: no request takes it.
    """
    from latentrt.request import OPTIONS
    from latentrt.sampling import samplers

    keyword = option.name or ""
    if keyword not in OPTIONS or not option.expose_value or value in (None, ()):
        return
    try:
        OPTIONS[keyword].check(keyword, dict(value) if OPTIONS[keyword].check.kind == "pairs" else value)
        if keyword == "sampler":
            samplers.choose(value)
    except RequestError as error:
        raise RequestError(error.describe({keyword: spell(context, option)})) from None


def _check_tables(tree: dict[str, Any], commands: set[tuple[str, ...]], above: tuple[str, ...] = ()) -> None:
    """Reject a table of a group that is not one of its commands; the others are checked when they are read."""
    groups = {names[: len(above) + 1] for names in commands if len(names) > len(above) + 1}
    for name, table in tree.items():
        names = (*above, name)
        if names in groups and isinstance(table, dict):
            _check_tables(table, commands, names)
        elif names not in commands:
            raise refuse_table(names, table, [".".join(each) for each in commands])


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return ", ".join(map(_as_text, value))
    return str(value)


def template(root: click.Context) -> str:
    """Return a configuration file in which every option is commented out, with its default and its help."""
    lines = [
        "# Defaults of the options of latentrt: a table for each command, a key for each option.",
        "# Remove the # before a table and an option to set it. `latentrt config` prints the options that are set.",
    ]
    for context, found in list_commands(root):
        lines += ["", f"# [{'.'.join(context.command_path.split()[1:])}]"]
        for each in found.params:
            if isinstance(each, click.Option):
                lines.append(f"# {flag_of(each).removeprefix('--')} = {_example(each, context)}  # {each.help or ''}")
    return "\n".join(lines) + "\n"


def _example(each: click.Option, context: click.Context) -> str:
    """Return the default as TOML; an empty value is none."""
    default = each.get_default(context)
    if each.multiple:
        return "[]"
    if isinstance(default, bool):
        return _as_text(default)
    if isinstance(default, int | float | str | os.PathLike):
        return json.dumps(default if isinstance(default, int | float) else os.fspath(default), ensure_ascii=False)
    return '""'


def _write(text: str) -> None:
    """Write the configuration file, never over another.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    path = config_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise OutputError(f"{path} exists and is left as it is; edit it, or move it away first") from None
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; LATENTRT_CONFIG names another file") from None

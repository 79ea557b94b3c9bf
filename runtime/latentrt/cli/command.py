"""The classes of every command: common options, help pages, sources of values, and errors that name what was typed.

A command is declared with `command` (or `Group.command`) and `option`, which are click's decorators with the classes of
this module. Each command has the options of `Settings`, which its function reads with `settings()`.

The value of an option is, in this order: the command line's, that of the environment variable (`LATENTRT_RUN_STEPS` for
`latentrt run --steps`), that of the configuration file (`latentrt.cli.config_file`), the default.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from latentrt.bundle.printable import did_you_mean, quote
from latentrt.cli.output import echo_block, echo_error, echo_traceback, set_log_level
from latentrt.errors import LatentRTError

__all__ = [
    "COMMON_GROUP",
    "Argument",
    "Command",
    "Group",
    "Option",
    "Settings",
    "argument",
    "command",
    "describe_usage",
    "describe_values",
    "flag_of",
    "option",
    "report_error",
    "set_by",
    "settings",
    "spell",
    "spelling",
    "typed_arguments",
]

F = TypeVar("F", bound=Callable[..., Any])

_HELP_NAMES = ["-h", "--help"]
COMMON_GROUP = "Common options"
_log = logging.getLogger("latentrt")
_WIDTH = 100  # columns of a help page, at most
_PREFIX = "LATENTRT"
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# Keys of `Context.meta`.
_TYPED = "latentrt.typed"  # name of a parameter → the option as it was typed
_LINE = "latentrt.line"  # (arguments of the command, indices of those that are no options)
_FILE = "latentrt.file"  # (the configuration file, the table of the command)
_ALSO = "latentrt.also"  # name of a parameter → that of the option that set it, such as height → size


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The common options of a command.

    Attributes:
        json: print one JSON document on standard output in place of text.
        quiet: print no progress and no reports, only warnings, errors and what the command is for.
        verbosity: number of `-v`: 0, 1 for details, 2 for debugging.
        log_level: of the logger `latentrt`, as given; None where it follows from `verbosity`.
        debug: print the traceback of an error.
    """

    json: bool = False
    quiet: bool = False
    verbosity: int = 0
    log_level: str | None = None
    debug: bool = False

    @property
    def level(self) -> int:
        """The level of the logger `latentrt`, a number of `logging`."""
        if self.log_level is not None:
            return _LEVELS[self.log_level]
        return (logging.WARNING, logging.INFO, logging.DEBUG)[min(self.verbosity, 2)]


def settings() -> Settings:
    """Return the common options of the command that is running; the defaults outside of one."""
    context = click.get_current_context(silent=True)
    return (context.find_object(Settings) if context is not None else None) or Settings()


class _Described(click.Parameter):
    """A parameter that refuses malformed values in the style of `latentrt.errors`."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Convert a value; see click."""
        try:
            return super().type_cast_value(ctx, value)
        except click.BadParameter:
            expected = describe_values(self.type)
            if expected is None:
                raise
            message = f"got {self._find_malformed(ctx, value)}, expected {expected}{self._suggest(value)}"
            raise click.BadParameter(message, ctx=ctx, param=self) from None

    def _find_malformed(self, ctx: click.Context, value: Any) -> str:
        for each in value if self.multiple and isinstance(value, list | tuple) else [value]:
            try:
                self.type(each, param=self, ctx=ctx)
            except click.BadParameter:
                return quote(each)
        return quote(value)

    def _suggest(self, value: Any) -> str:
        if not isinstance(self.type, click.Choice) or not isinstance(value, str):
            return ""
        return did_you_mean(value.lower(), [str(each) for each in self.type.choices])


class Argument(_Described, click.Argument):
    """An argument."""


class Option(_Described, click.Option):
    """An option that belongs to a group of the help page.

    Args:
        group: the heading under which the help page lists it.
    """

    def __init__(self, *declarations: Any, group: str = "Options", **attributes: Any) -> None:
        super().__init__(*declarations, **attributes)
        self.group = group
        if self.metavar is None and isinstance(self.type, click.types.IntParamType | click.types.FloatParamType):
            self.metavar = None if self.is_flag or self.count else "N"


def argument(*declarations: str, **attributes: Any) -> Callable[[F], F]:
    """Return the decorator of an argument."""
    return click.argument(*declarations, cls=Argument, **attributes)


def option(*declarations: str, group: str = "Options", **attributes: Any) -> Callable[[F], F]:
    """Return the decorator of an option; `group` is the heading under which the help page lists it."""
    return click.option(*declarations, cls=Option, group=group, **attributes)


def command(name: str | None = None, *, examples: Sequence[str], **attributes: Any) -> Callable[[F], Command]:
    """Return the decorator of a command.

    Args:
        name: of the command; None: that of the function.
        examples: command lines for the help page, with a comment after two spaces and `#`.
    """
    return click.command(name, cls=Command, examples=examples, **attributes)


class Command(click.Command):
    """A command with the common options, a help page with examples, and values of the environment and a file.

    Args:
        examples: command lines for the help page.
        uses_file: whether the configuration file sets its options.
    """

    def __init__(
        self, *arguments: Any, examples: Sequence[str] = (), uses_file: bool = True, **attributes: Any
    ) -> None:
        super().__init__(*arguments, **attributes)
        self.examples, self.uses_file = tuple(examples), uses_file
        taken = {each for parameter in self.params for each in parameter.opts}
        self.params += [each for each in _make_common_options() if not taken & {*each.opts}]
        self.context_settings = {
            "help_option_names": _HELP_NAMES,
            "max_content_width": _WIDTH,
            "show_default": True,
            **self.context_settings,
        }
        if self.examples:  # for documentation that is generated from `epilog`
            self.epilog = "\b\nExamples:\n" + "\n".join(f"  {each}" for each in self.examples)
        self.name_variables(f"{_PREFIX}_{_as_variable(self.name or '')}")

    def name_variables(self, prefix: str) -> None:
        """Name the environment variable of each option, such as `LATENTRT_RUN_STEPS`."""
        self.prefix = prefix
        for each in self.params:
            if isinstance(each, click.Option):
                name = _as_variable(flag_of(each))
                shared = [f"{_PREFIX}_{name}"] if each.name in _SHARED else []
                each.envvar = [f"{prefix}_{name}", *shared]

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parse the arguments; see click."""
        extra.setdefault("allow_extra_args", True)  # refused in `parse_args`, in our words
        return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments, and note how each option was typed.

        Raises:
            click.UsageError: the arguments are wrong. RequestError: the configuration file is.
        """
        typed, positions = _scan(self.params, args)
        ctx.meta[_TYPED], ctx.meta[_LINE], ctx.meta[_ALSO] = typed, (tuple(args), positions), {}
        if not ctx.resilient_parsing and not {*_HELP_NAMES} & {*args}:
            if self.uses_file:
                self.read_file(ctx)
            self.check_variables()
        try:
            rest = super().parse_args(ctx, args)
        except click.BadOptionUsage as error:
            error.ctx = ctx  # which click leaves out
            raise
        if rest and not ctx.resilient_parsing:
            takes = [each.human_readable_name for each in self.params if isinstance(each, click.Argument)]
            raise click.UsageError(
                f"got {' '.join(quote(each) for each in rest[:3])}{' …' if len(rest) > 3 else ''} as well, expected "
                f"{' and '.join(takes) or 'options'} only; quote a text that has spaces",
                ctx,
            )
        return rest

    def read_file(self, ctx: click.Context) -> None:
        """Take defaults from the configuration file.

        Raises:
            RequestError: the file is malformed, or has a table or key that does not exist.
        """
        from latentrt.cli.config_file import config_path, read_config, table_values

        if not (tree := read_config()):
            return
        root, names = ctx.find_root().command, ctx.command_path.split()[1:]
        known = root.list_commands(ctx) if isinstance(root, click.Group) else names
        ctx.default_map = table_values(tree, names, known, self)
        ctx.meta[_FILE] = (config_path(), ".".join(names))

    def invoke(self, ctx: click.Context) -> Any:
        """Call the function of the command; an error ends it with one line on stderr and the error's exit code."""
        given = {name: ctx.params.pop(key) for key, name in _COMMON.items() if key in ctx.params}
        ctx.obj = made = Settings(**given)
        if made.quiet and made.verbosity:
            options = {each.name: each for each in self.params}
            quiet, verbose = (spell(ctx, options[name]) for name in ("_quiet", "_verbosity"))
            raise click.UsageError(f"got {quiet} and {verbose}, expected one of the two", ctx)
        set_log_level(made.level)
        for each in self.params:
            if ctx.get_parameter_source(each.name or "") in (ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP):
                _log.info("%s is set by %s", flag_of(each), spell(ctx, each))
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:
            debug = made.debug or bool(ctx.find_root().params.get("debug"))
            ctx.exit(report_error(error, spelling(), debug=debug))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            record = None if isinstance(each, click.Argument) else each.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(each, "group", COMMON_GROUP), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, and where else options are set."""
        _write_examples(formatter, self.examples)
        formatter.write_paragraph()
        flag = next((each for each in map(flag_of, self.params) if each.startswith("--")), "--json")
        formatter.write_text(
            f"Each option may also be set by an environment variable ({flag}: {self.prefix}_{_as_variable(flag)}) or "
            "in the configuration file (latentrt config). The command line wins over the environment, the environment "
            "over the file."
        )

    def check_variables(self) -> None:
        """Warn of environment variables that look like those of this command's options but are none."""
        variables = {name for each in self.params for name in _variables_of(each)}
        for name in sorted(os.environ):
            if name.startswith(f"{self.prefix}_") and name not in variables:
                near = did_you_mean(name, variables)
                _log.warning("the environment variable %s is that of no option%s", name, near)


class Group(click.Group):
    """A group of commands with a help page; an unknown command is refused with the nearest known one.

    Args:
        examples: command lines for the help page.
    """

    command_class = Command

    def __init__(self, *arguments: Any, examples: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **{"invoke_without_command": True, **attributes})
        self.examples = tuple(examples)
        self.context_settings = {
            "help_option_names": _HELP_NAMES,
            "max_content_width": _WIDTH,
            "show_default": True,
            **self.context_settings,
        }

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command; see click."""
        super().add_command(cmd, name)
        if isinstance(cmd, Command):
            cmd.name_variables(f"{_PREFIX}_{_as_variable(self.name or '')}_{_as_variable(name or cmd.name or '')}")

    def invoke(self, ctx: click.Context) -> Any:
        """Call the command; without one, print the help page."""
        result = super().invoke(ctx)
        if ctx.invoked_subcommand is None:
            echo_block(ctx.get_help())
        return result

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments name.

        Raises:
            click.UsageError: it does not exist.
        """
        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            near = did_you_mean(args[0], self.list_commands(ctx))
            hint = near or f"; {ctx.command_path} --help lists them"
            raise click.UsageError(f"got {quote(args[0])}, expected a command of {ctx.command_path}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        _write_examples(formatter, self.examples)
        super().format_epilog(ctx, formatter)


def spell(ctx: click.Context, parameter: click.Parameter) -> str:
    """Return a parameter as the user set it: the option as typed, the environment variable, or the key of the file."""
    if isinstance(parameter, click.Argument):
        return parameter.human_readable_name.strip("[].")
    name = parameter.name or ""
    match ctx.get_parameter_source(name):
        case ParameterSource.COMMANDLINE:
            typed: str = ctx.meta.get(_TYPED, {}).get(name, flag_of(parameter))
            return typed
        case ParameterSource.ENVIRONMENT:
            return next((each for each in _variables_of(parameter) if os.environ.get(each)), flag_of(parameter))
        case ParameterSource.DEFAULT_MAP if _FILE in ctx.meta:
            path, table = ctx.meta[_FILE]
            return f"{flag_of(parameter).removeprefix('--')} in [{table}] of {path}"
    return flag_of(parameter)


def set_by(ctx: click.Context, name: str, other: str) -> None:
    """Note that the option `other` set the parameter `name`, so that errors name it."""
    ctx.meta.setdefault(_ALSO, {})[name] = other


def typed_arguments(ctx: click.Context) -> tuple[tuple[str, ...], list[int]]:
    """Return the arguments of the command as typed, and the indices of those that do not belong to options."""
    found: tuple[tuple[str, ...], list[int]] = ctx.meta.get(_LINE, ((), []))
    return found


def flag_of(parameter: click.Parameter) -> str:
    """Return the longest spelling of an option, such as `--width` of `-W/--width`."""
    return max(parameter.opts, key=len)


def describe_usage(error: click.UsageError) -> str:
    """Return the message of wrong usage: the option as typed, the value found, the values expected."""
    ctx = error.ctx
    if isinstance(error, click.NoSuchOption) and ctx is not None:
        near = _find_option(ctx, error.option_name, error.possibilities or ())
        return f"got {error.option_name}, expected an option of {ctx.command_path}{near}"
    if isinstance(error, click.BadOptionUsage) and ctx is not None:
        parameter = next((each for each in ctx.command.params if error.option_name in each.opts), None)
        if isinstance(parameter, click.Option) and not (parameter.is_flag or parameter.count):
            return f"{error.option_name}: got no value, expected {describe_values(parameter.type) or 'one'}"
        return f"{error.option_name}: got a value, expected none"
    if isinstance(error, click.MissingParameter) and error.param is not None and ctx is not None:
        return f"{spell(ctx, error.param)} is missing, as in: {_usage_of(ctx)}"
    if isinstance(error, click.BadParameter) and error.param is not None and ctx is not None:
        return f"{spell(ctx, error.param)}: {error.message}"
    return error.format_message()


def report_error(error: Exception, spelled: Mapping[str, str], *, debug: bool) -> int:
    """Print an error and return its exit code."""
    if debug:
        echo_traceback(error)
    if isinstance(error, LatentRTError):
        echo_error(f"error: {error.describe(spelled)}")
        return error.exit_code
    echo_error(f"error: {type(error).__name__}: {error}")
    echo_error("This is a defect of latentrt; --debug shows where.")
    return 1


def spelling() -> dict[str, str]:
    """Return keyword → spelling (`LatentRTError.describe`) of the running command, each option as the user set it."""
    ctx = click.get_current_context(silent=True)
    from latentrt.cli.request_options import SPELLING, command_spelling

    if ctx is None:
        return SPELLING
    also: Mapping[str, str] = ctx.meta.get(_ALSO, {})
    options = {each.name or "": each for each in ctx.command.params}
    defaults = (ParameterSource.DEFAULT, None)
    given = {}
    for name in {**options, **also}:
        source = also.get(name, name)
        if source in options and ctx.get_parameter_source(source) not in defaults:
            given[name] = spell(ctx, options[source])
    return {**SPELLING, **command_spelling(ctx.command), **given}


def _make_common_options() -> list[Option]:
    level = click.Choice(list(_LEVELS))
    group = COMMON_GROUP
    return [
        Option(["--json", "_json"], is_flag=True, group=group, help="Print the result as one JSON document."),
        Option(
            ["-v", "--verbose", "_verbosity"],
            count=True,
            show_default=False,
            group=group,
            help="Log more; -vv also logs details.",
        ),
        Option(["-q", "--quiet", "_quiet"], is_flag=True, group=group, help="No progress and no reports."),
        Option(["--log-level", "_log_level"], type=level, group=group, help="Level of the messages on stderr."),
        Option(["--debug", "_debug"], is_flag=True, group=group, help="Show the traceback of an error."),
    ]


_COMMON = {
    "_json": "json",
    "_verbosity": "verbosity",
    "_quiet": "quiet",
    "_log_level": "log_level",
    "_debug": "debug",
}
_SHARED = {"_verbosity", "_quiet", "_log_level", "_debug"}  # also by a variable for all commands, as LATENTRT_LOG_LEVEL


def _variables_of(parameter: click.Parameter) -> Sequence[str]:
    variables = parameter.envvar
    return [variables] if isinstance(variables, str) else variables or ()


def _as_variable(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_").upper()


def _scan(parameters: Sequence[click.Parameter], args: Sequence[str]) -> tuple[dict[str, str], list[int]]:
    """Return the spelling of each option that the arguments hold, and the indices of those that are no options."""
    options = {flag: each for each in parameters if isinstance(each, click.Option) for flag in _flags(each)}
    typed, positions, indices = dict[str, str](), list[int](), iter(range(len(args)))
    for index in indices:
        argument = args[index]
        if argument == "--":
            positions += indices
        elif not argument.startswith("-") or argument == "-":
            positions.append(index)
        elif argument.startswith("--"):
            flag, equals, _ = argument.partition("=")
            if (found := options.get(flag)) is not None:
                typed[found.name or ""] = flag
                if _takes_value(found) and not equals:
                    next(indices, None)
        else:
            for place, letter in enumerate(argument[1:], 2):
                if (found := options.get(f"-{letter}")) is None:
                    break
                typed[found.name or ""] = f"-{letter}"
                if _takes_value(found):
                    if place == len(argument):
                        next(indices, None)
                    break
    return typed, positions


def _flags(parameter: click.Option) -> Iterator[str]:
    yield from parameter.opts
    yield from parameter.secondary_opts


def _takes_value(parameter: click.Option) -> bool:
    return not (parameter.is_flag or parameter.count)


def describe_values(kind: click.ParamType) -> str | None:  # type: ignore[type-arg]  # generic for type checkers only
    """Describe the values of click's own types; None for other types, which describe them in their messages."""
    if isinstance(kind, click.Choice):
        return f"one of {', '.join(map(str, kind.choices))}"
    if isinstance(kind, click.IntRange | click.FloatRange):
        return f"a{' whole' if isinstance(kind, click.IntRange) else ''} number{_describe_range(kind)}"
    if isinstance(kind, click.types.IntParamType):
        return "a whole number"
    if isinstance(kind, click.types.FloatParamType):
        return "a number"
    if isinstance(kind, click.types.BoolParamType):
        return "true or false"
    return None


def _describe_range(kind: click.IntRange | click.FloatRange) -> str:
    if kind.min is not None and kind.max is not None:
        return f" from {kind.min} to {kind.max}"
    if kind.min is not None:
        return f" {'above' if kind.min_open else 'of at least'} {kind.min}"
    return f" of at most {kind.max}" if kind.max is not None else ""


def _find_option(ctx: click.Context, name: str, near: Sequence[str]) -> str:
    """Return a hint at the option that was meant: that of a Python keyword, of another tool's, or one spelled alike."""
    from latentrt.migration import keyword_advice

    keyword = name.lstrip("-").replace("-", "_")
    meant = {keyword, keyword_advice(keyword)}
    for each in ctx.command.params:
        if isinstance(each, click.Option) and meant & {each.name, _as_variable(flag_of(each)).lower()}:
            return f"; did you mean {flag_of(each)}?"
    return f"; did you mean {near[0]}?" if near else f"; {ctx.command_path} --help lists them"


def _usage_of(ctx: click.Context) -> str:
    examples = getattr(ctx.command, "examples", ())
    return examples[0] if examples else f"{ctx.command_path} {' '.join(ctx.command.collect_usage_pieces(ctx))}"


def _write_examples(formatter: click.HelpFormatter, examples: Sequence[str]) -> None:
    if examples:
        with formatter.section("Examples"):
            for each in examples:  # unwrapped, to be copied
                formatter.write(f"{'':{formatter.current_indent}}{each}\n")

"""Command-line options of a request, generated from its declarations (`latentrt.request`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from latentrt.cli.option import Option as KeyValue
from latentrt.request import OPTIONS, Option

__all__ = ["SPELLING", "command_spelling", "given_options", "request_options"]

F = TypeVar("F", bound=Callable[..., Any])

_TYPES: dict[str, Any] = {"int": int, "float": float, "text": str, "path": click.Path(path_type=Path)}
_SHORT = {"negative_prompt": "-n"}

# Python keyword → spelling on the command line, for error messages.
SPELLING: dict[str, str] = {
    **{each.keyword: each.flag for each in OPTIONS.values() if each.flag is not None},
    "prompt": "PROMPT",
    "seed": "--seed",
    "num_images_per_prompt": "--images",
    **{name: f"--{name}" for name in ("device", "digest", "precision", "provider", "threads")},
}


def command_spelling(command: click.Command) -> dict[str, str]:
    """Return the spelling of a command's own options by Python keyword, such as `parts=False` → `--no-parts`."""
    spelling, plurals = {}, {}
    for parameter in command.params:
        for option in (*parameter.opts, *parameter.secondary_opts):
            if option.startswith("--no-"):
                spelling[f"{option.removeprefix('--no-').replace('-', '_')}=False"] = option
            elif option.startswith("--"):
                spelling[parameter.name or ""] = option
                if option.endswith("s"):  # `--samplers` takes several of the keyword `sampler`
                    plurals[option.removeprefix("--").removesuffix("s").replace("-", "_")] = option
    return plurals | spelling  # an option's own spelling wins: `--image` over `--images`


def request_options(*keywords: str) -> Callable[[F], F]:
    """Return a decorator that adds options to a click command.

    Args:
        keywords: of the options; none: all that have a flag.
    """
    chosen = [OPTIONS[keyword] for keyword in keywords] or [each for each in OPTIONS.values() if each.flag]

    def decorate(command: F) -> F:
        for each in reversed(chosen):
            command = _click_option(each)(command)
        return command

    return decorate


def given_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, as keywords of `Request.of`."""
    given = {keyword: value for keyword, value in options.items() if value is not None and value != ()}
    return {key: dict(value) if OPTIONS[key].check.kind == "pairs" else value for key, value in given.items()}


def _click_option(option: Option) -> Callable[[F], F]:
    kind = option.check.kind
    assert option.flag is not None, "only options with a flag are on the command line"
    flags = [option.flag]
    settings: dict[str, Any] = {"default": None, "help": option.help}
    if option.default is not None:
        settings["help"] += f"  [default: {option.default}]"
    if kind == "switch":
        flags = [f"{option.flag}/--no-{option.flag.removeprefix('--')}"]
    elif kind == "pairs":
        settings |= {"type": KeyValue(), "multiple": True, "help": f"{option.help}  May be repeated."}
        del settings["default"]
    else:
        settings["type"] = _TYPES[kind]
    if option.keyword in _SHORT:
        flags.insert(0, _SHORT[option.keyword])
    return click.option(*flags, option.keyword, **settings)

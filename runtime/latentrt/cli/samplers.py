"""The command `latentrt samplers`: lists the samplers, with their cost, options and other names."""

from __future__ import annotations

import json
import math
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
import msgspec

from latentrt.cli.command import COMMON_GROUP, command, option, set_by, settings
from latentrt.cli.document import echo_document
from latentrt.cli.output import echo, echo_block
from latentrt.cli.request_options import samplers as known_samplers
from latentrt.cli.values import Suggested

if TYPE_CHECKING:
    from latentrt.sampling.samplers import Sampler, SamplerChoice

__all__ = ["SamplersDocument", "samplers"]

_COLUMNS = 100  # the width without a terminal, and the largest width
_INDENT = 18
_COUNTS = (1, 10, 20, 50)  # steps for which --json gives the number of evaluations

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
_LISTS = {int: "whole numbers", float: "numbers"}
_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}


class OptionDocument(msgspec.Struct, frozen=True, kw_only=True):
    """An option of a sampler's configuration.

    Attributes:
        values: a description of the values.
        choices: all values, where they can be listed.
        default: absent where the option is required; an infinity as the text that diffusers uses.
    """

    values: str
    choices: list[Any] | msgspec.UnsetType = msgspec.UNSET
    default: Any | msgspec.UnsetType = msgspec.UNSET


class SamplerDocument(msgspec.Struct, frozen=True, kw_only=True):
    """One sampler.

    Attributes:
        class_name: of diffusers. kind: of the models that it is for.
        aliases: its other names, with the options that each implies.
        suffixes: that may follow its name, such as `_karras`.
        evaluations_per_step: of the model, in words. evaluations: in a number of steps.
        unsupported_reason: why the pipeline does not run it; null if it does.
        run_options: of a run. options: of the configuration, by diffusers' names.
    """

    name: str
    title: str
    class_name: str
    kind: str
    aliases: dict[str, dict[str, Any]]
    suffixes: list[str]
    evaluations_per_step: str
    evaluations: dict[str, int]
    unsupported_reason: str | None
    run_options: list[str]
    options: dict[str, OptionDocument]


class SamplersDocument(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `latentrt samplers --json`."""

    samplers: list[SamplerDocument]


@command(
    examples=(
        "latentrt samplers",
        'latentrt samplers "DPM++ 2M Karras" --verbose',
        "latentrt samplers euler heun --json",
    )
)
@click.argument("names", nargs=-1, metavar="[NAME]...", type=Suggested(known_samplers))
@option(
    "-v",
    "--verbose",
    is_flag=True,
    group=COMMON_GROUP,
    help="Also print the options of the configuration and of a run.",
)
def samplers(names: tuple[str, ...], verbose: bool) -> None:
    """List the samplers, or those called NAME, with the diffusers class that each is equivalent to, the kind of model
    it is for, its cost, and its other names.

    A NAME may be that of any tool: euler_a, EulerAncestralDiscreteScheduler, "DPM++ 2M Karras".
    """
    from latentrt.sampling.samplers import SAMPLERS, choose

    set_by(click.get_current_context(), "sampler", "names")
    choices = {name: choose(name) for name in names}
    listed = list(dict.fromkeys(choice.name for choice in choices.values())) or list(SAMPLERS)
    if settings().json:
        echo_document(SamplersDocument(samplers=[_describe(name) for name in listed]))
        return
    for name in listed:
        _print_sampler(name, verbose=verbose)
        if verbose and name != listed[-1]:
            echo()
    echo()
    for note in _notes(choices):
        _print_wrapped(note)


def _describe(name: str) -> SamplerDocument:
    from latentrt.sampling.samplers import SAMPLERS

    sampler = SAMPLERS[name]
    return SamplerDocument(
        name=name,
        title=sampler.title,
        class_name=sampler.class_name,
        kind=sampler.kind,
        aliases={alias: dict(implied) for alias, implied in _aliases(name).items()},
        suffixes=suffixes(sampler),
        evaluations_per_step=cost(sampler),
        evaluations={str(count): evaluations(sampler, count) for count in _COUNTS},
        unsupported_reason=sampler.unsupported_reason or None,
        run_options=sorted(sampler.run_options),
        options={option.name: _describe_option(option) for option in options(sampler)},
    )


def _aliases(name: str) -> dict[str, Mapping[str, Any]]:
    """Return each other name of a sampler, and the options that it implies."""
    from latentrt.sampling.samplers import aliases_of, choose

    return {alias: choose(alias).options for alias in aliases_of(name)}


def _describe_option(option: ConfigOption) -> OptionDocument:
    text = format_default(option)  # JSON has no infinity; encode it as the string diffusers uses
    default = msgspec.UNSET if option.required else text if "Infinity" in text else option.default
    choices = msgspec.UNSET if option.choices is None else list(option.choices)
    return OptionDocument(values=option.values, choices=choices, default=default)


def _print_sampler(name: str, *, verbose: bool) -> None:
    from latentrt.sampling.samplers import SAMPLERS

    sampler = SAMPLERS[name]
    echo(f"  {sampler.title}", bold=name.ljust(_INDENT - 2))
    _print_wrapped(f"{sampler.class_name}, for {sampler.kind} models, cost {cost(sampler)}", _INDENT)
    if others := [*_aliases(name), *(f"…{suffix}" for suffix in suffixes(sampler))]:
        _print_wrapped(f"also {', '.join(others)}", _INDENT)
    if sampler.unsupported_reason:
        _print_wrapped(f"not run by the pipeline: {sampler.unsupported_reason}", _INDENT)
    if verbose:
        _print_wrapped(f"options of a run: {', '.join(['begin', *sorted(sampler.run_options)])}", _INDENT)
        _print_options(options(sampler))


def _print_options(listed: Sequence[ConfigOption]) -> None:
    names = max(len(option.name) for option in listed)
    defaults = max(len(format_default(option)) for option in listed)
    for each in listed:
        start = f"{'':4}{each.name:<{names}}  {format_default(each):<{defaults}}  "
        _print_wrapped(start + each.values, len(start), first=0)


def _notes(choices: Mapping[str, SamplerChoice]) -> Iterator[str]:
    for name, choice in choices.items():
        if implied := _implied_options(choice):
            yield f"{name} is {choice.name} with {implied}."
    yield (
        "Cost is the number of model evaluations per step with the default options, which are diffusers' (--verbose "
        "lists them). The suffixes _karras, _exponential and _beta select the spacing of the sigmas and follow any "
        'name of a sampler. Names as A1111 writes them work too: "DPM++ 2M Karras".'
    )


def _implied_options(choice: SamplerChoice) -> str:
    changed = {key: value for key, value in choice.options.items() if value != getattr(choice.sampler, key, None)}
    return ", ".join(f"{key} {json.dumps(value)}" for key, value in changed.items())


def _print_wrapped(text: str, indent: int = 0, first: int | None = None) -> None:
    columns = min(shutil.get_terminal_size((_COLUMNS, 24)).columns, _COLUMNS)
    echo_block(
        textwrap.fill(
            text,
            max(columns, indent + 20),
            initial_indent=" " * (indent if first is None else first),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    )


@dataclass(frozen=True, kw_only=True)
class ConfigOption:
    """A key of a sampler's configuration.

    Attributes:
        name: the key.
        default: diffusers' own; without meaning where `required`.
        required: whether there is no default.
        values: a description of the supported values.
        choices: all supported values, where they can be listed; None otherwise.
    """

    name: str
    default: Any
    required: bool
    values: str
    choices: tuple[Any, ...] | None


def options(sampler: type[Sampler]) -> list[ConfigOption]:
    """Return the keys of a sampler's configuration, in the order of its class."""
    hints = get_type_hints(sampler, include_extras=True)
    return [
        ConfigOption(
            name=field.name,
            default=field.default,
            required=field.default is MISSING,
            values=_describe_type(hints[field.name]),
            choices=_choices(hints[field.name]),
        )
        for field in fields(sampler)
    ]


def evaluations(sampler: type[Sampler], count: int) -> int:
    """Return the number of model evaluations in `count` steps, with the default configuration."""
    from latentrt.sampling.samplers import Sampler

    # A class that inherits the method evaluates once per step; it may have keys without a default.
    return count if sampler.evaluations is Sampler.evaluations else sampler().evaluations(count)


def cost(sampler: type[Sampler]) -> str:
    """Describe the model evaluations per step with the default configuration: `1`, `2 (last step 1)`, …"""
    few, more, many = (evaluations(sampler, count) for count in (20, 21, 50))
    each = more - few
    extra = few - 20 * each
    if many != 50 * each + extra:
        return f"{few / 20:g} in 20 steps, {many / 50:g} in 50"
    if extra == 0:
        return str(each)
    return f"{each} (last step {each + extra})" if extra < 0 else f"{each}, and {extra} more in a run"


def suffixes(sampler: type[Sampler]) -> list[str]:
    """Return the suffixes that may follow a sampler's name: `_karras`, …"""
    from latentrt.sampling.samplers.aliases import SPACING_SUFFIXES

    known = {field.name for field in fields(sampler)}
    return [suffix for suffix, spacing in SPACING_SUFFIXES.items() if f"use_{spacing}_sigmas" in known]


def format_default(option: ConfigOption) -> str:
    """Return a default as JSON, an infinite one as diffusers writes it, or `required`."""
    return "required" if option.required else _format_value(option.default)


def _format_value(value: Any) -> str:
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return msgspec.json.encode(value).decode()


def _describe_type(hint: Any) -> str:
    """Describe the values of a type: `a number above 0`, `"linspace" or "leading"`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_describe_type(arguments[0])} {_describe_bounds(arguments[1])}"
    if origin in (Union, UnionType):
        return " or ".join(map(_describe_type, arguments))
    if origin is Literal:
        return " or ".join(map(_format_value, arguments))
    if origin is tuple:
        return _LISTS[arguments[0]]
    return _NAMES[hint]


def _describe_bounds(meta: msgspec.Meta) -> str:
    if meta.min_length is not None:
        return f"({meta.min_length} or more)"
    bounds = ((word, getattr(meta, key)) for key, word in _BOUNDS.items())
    return " and ".join(f"{word} {bound:,}" for word, bound in bounds if bound is not None)


def _choices(hint: Any) -> tuple[Any, ...] | None:
    """Return all values of a type, None where they cannot be listed."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        parts = [_choices(argument) for argument in arguments]
        listed = [choices for choices in parts if choices is not None]
        return sum(listed, ()) if len(listed) == len(parts) else None
    if origin is Literal:
        return arguments
    return {bool: (True, False), NoneType: (None,)}.get(hint)

"""What is there to know of a sampler before it is used?

All of it is read off its class: what it costs, which endings its name may have, what may be said in its configuration.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from latentrt.sampling.samplers import Sampler
from latentrt.sampling.samplers.aliases import RESPACINGS

__all__ = ["REQUIRED", "OptionFact", "cost", "endings", "evaluations", "options", "shown"]

REQUIRED = object()  # in place of a default

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", NoneType: "null"}
_LISTS = {int: "whole numbers", float: "numbers"}
_BOUNDS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}


@dataclass(frozen=True, kw_only=True)
class OptionFact:
    """A key of a sampler's configuration.

    Attributes:
        name: the key.
        default: diffusers' own; `REQUIRED` where there is none.
        values: what it may be, in words.
        choices: all that it may be, where that can be listed; null (None) among them where it may be.
    """

    name: str
    default: Any
    values: str
    choices: tuple[Any, ...] | None


def options(sampler: type[Sampler]) -> list[OptionFact]:
    """The keys of its configuration, in the order of its class."""
    hints = get_type_hints(sampler, include_extras=True)
    return [
        OptionFact(
            name=field.name,
            default=REQUIRED if field.default is MISSING else field.default,
            values=_values(hints[field.name]),
            choices=_choices(hints[field.name]),
        )
        for field in fields(sampler)
    ]


def evaluations(sampler: type[Sampler], count: int) -> int:
    """How many times the model is asked in so many steps, with the defaults of the configuration."""
    # A class that says nothing of its own asks once in a step; it may have keys without a default.
    return count if sampler.evaluations is Sampler.evaluations else sampler().evaluations(count)


def cost(sampler: type[Sampler]) -> str:
    """How many evaluations of the model a step takes: `1`, `2 (last step 1)`, …, with the default configuration."""
    few, more, many = (evaluations(sampler, count) for count in (20, 21, 50))
    each = more - few
    beside = few - 20 * each
    if many != 50 * each + beside:
        return f"{few / 20:g} in 20 steps, {many / 50:g} in 50"
    if beside == 0:
        return str(each)
    return f"{each} (last step {each + beside})" if beside < 0 else f"{each}, and {beside} more in a run"


def endings(sampler: type[Sampler]) -> list[str]:
    """What may be added to its name: `_karras`, …"""
    known = {field.name for field in fields(sampler)}
    return [ending for ending, kind in RESPACINGS.items() if f"use_{kind}_sigmas" in known]


def shown(value: Any) -> str:
    """A default as JSON writes it, and as diffusers writes an infinite one."""
    if value is REQUIRED:
        return "required"
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return msgspec.json.encode(value).decode()


def _values(hint: Any) -> str:
    """A type in words: `a number above 0`, `"linspace" or "leading"`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_values(arguments[0])} {_bounds(arguments[1])}"
    if origin in (Union, UnionType):
        return " or ".join(map(_values, arguments))
    if origin is Literal:
        return " or ".join(map(shown, arguments))
    if origin is tuple:
        return _LISTS[arguments[0]]
    return _NAMES[hint]


def _bounds(meta: msgspec.Meta) -> str:
    if meta.min_length is not None:
        return f"({meta.min_length} or more)"
    bounds = ((word, getattr(meta, key)) for key, word in _BOUNDS.items())
    return " and ".join(f"{word} {bound:,}" for word, bound in bounds if bound is not None)


def _choices(hint: Any) -> tuple[Any, ...] | None:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        found = [_choices(argument) for argument in arguments]
        listed = [choices for choices in found if choices is not None]
        return sum(listed, ()) if len(listed) == len(found) else None
    if origin is Literal:
        return arguments
    return {bool: (True, False), NoneType: (None,)}.get(hint)

"""How is a sampler's option written on a command line?"""

from __future__ import annotations

import json
import math
from typing import Any

import click

__all__ = ["Option"]


_PYTHON = {"True": True, "False": False, "None": None}


class Option(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """`solver_order=3`, `thresholding=true`, `timesteps=[999,500]`: a name and a JSON value, or a text as it stands."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):  # click converts twice
            return value[0], value[1]
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"found {value!r}, expected a name, = and a value, such as solver_order=3", param, ctx)
        if text in _PYTHON:
            return key, _PYTHON[text]
        try:
            return key, json.loads(text, parse_constant=_constant, parse_float=_finite)
        except (ValueError, RecursionError):
            return key, text


def _constant(text: str) -> float | str:
    """Infinity, as diffusers writes it for `lambda_min_clipped`; NaN stays a text."""
    return text if text == "NaN" else float(text)


def _finite(text: str) -> float | str:
    """A number that is one: `1e999` stays a text, which no option takes for a number."""
    number = float(text)
    return number if math.isfinite(number) else text

"""The command-line type of a sampler option: `solver_order=3`."""

from __future__ import annotations

import json
import math
from typing import Any

import click

__all__ = ["Option"]


_PYTHON = {"True": True, "False": False, "None": None}


class Option(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """A name and a value in JSON or as plain text: `solver_order=3`, `thresholding=true`, `timesteps=[999,500]`."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):  # click may convert twice
            return value[0], value[1]
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"got {value!r}, expected NAME=VALUE, such as solver_order=3", param, ctx)
        if text in _PYTHON:
            return key, _PYTHON[text]
        try:
            return key, json.loads(text, parse_constant=_parse_constant, parse_float=_parse_finite)
        except (ValueError, RecursionError):
            return key, text


def _parse_constant(text: str) -> float | str:
    """Return an infinity, which diffusers writes for `lambda_min_clipped`; NaN stays a string."""
    return text if text == "NaN" else float(text)


def _parse_finite(text: str) -> float | str:
    """Return a finite number; `1e999` stays a string, which every numeric option rejects."""
    number = float(text)
    return number if math.isfinite(number) else text

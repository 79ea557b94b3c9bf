"""Types of values on the command line, with completion."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.bundle.printable import quote
from latentrt.bundle.sample import SAMPLE, find_bundle

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["BundlePath", "HeightWidth", "ImageSize", "KeyValue", "Position", "Suggested"]

_MAX_FOLDERS = 1000  # entries of a folder that completion looks at


class BundlePath(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """The folder of a bundle, or `sample`; completed with the bundles of a folder.

    Args:
        files: whether it may be a file as well, for completion.
    """

    name = "bundle"

    def __init__(self, *, files: bool = False) -> None:
        self._other = "file" if files else "dir"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        return find_bundle(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the sample bundle and the bundles of the folder that is being typed; else, any folder."""
        from click.shell_completion import CompletionItem

        found = [CompletionItem(SAMPLE, help="the sample bundle")] if SAMPLE.startswith(incomplete) else []
        folder, start = os.path.split(incomplete)
        try:
            with os.scandir(folder or ".") as entries:
                found_names = (each.name for each in islice(entries, _MAX_FOLDERS) if each.name.startswith(start))
                # A shell reads lines of UTF-8, in which no other name can be written.
                names = sorted(filter(str.isprintable, found_names))
        except OSError:
            names = []
        paths = [os.path.join(folder, name) for name in names]
        bundles = [path for path in paths if os.path.isfile(os.path.join(path, "bundle.json"))]
        found += [CompletionItem(f"./{path}" if path == SAMPLE else path) for path in bundles]
        return found or [CompletionItem(incomplete, type=self._other)]


class ImageSize(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """The size of an image in pixels: `768x512`, width first, or `512` for a square."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):  # click may convert twice
            return value[0], value[1]
        found = re.fullmatch(r"(\d{1,9})(?:[xX×](\d{1,9}))?", value.strip())
        if found is None:
            self.fail(f"got {quote(value)}, expected WIDTHxHEIGHT such as 768x512, or 512 for a square", param, ctx)
        return int(found[1]), int(found[2] or found[1])


class HeightWidth(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """The size of an image as `ImageSize` reads it, as height and width, the order that requests have."""

    name = ImageSize.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):  # click may convert twice
            return value[0], value[1]
        width, height = ImageSize().convert(value, param, ctx)
        return height, width


class Position(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """A place in an image in pixels, its top and left: `64,0`."""

    name = "TOP,LEFT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):  # click may convert twice
            return value[0], value[1]
        found = re.fullmatch(r"(\d{1,9}),(\d{1,9})", value.strip())
        if found is None:
            self.fail(f"got {quote(value)}, expected TOP,LEFT in pixels such as 64,0", param, ctx)
        return int(found[1]), int(found[2])


class Suggested(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """A text whose usual values are completed; the code that uses it checks it.

    Args:
        values: returns the usual values; called by completion only, so it may import.
        several: whether the text is a list, separated by commas.
    """

    name = "text"

    def __init__(self, values: Callable[[], Iterable[str]], *, several: bool = False) -> None:
        self._values, self._several = values, several

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the values that begin with the text, of a list with its last item."""
        from click.shell_completion import CompletionItem

        before, comma, last = incomplete.rpartition(",") if self._several else ("", "", incomplete)
        return [CompletionItem(f"{before}{comma}{each}") for each in self._values() if each.startswith(last)]


_PYTHON = {"True": True, "False": False, "None": None}


class KeyValue(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """A name and a value in JSON or as plain text: `solver_order=3`, `thresholding=true`, `timesteps=[999,500]`."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):  # click may convert twice
            return value[0], value[1]
        key, equals, text = value.partition("=")
        if not equals or not key:
            self.fail(f"got {quote(value)}, expected NAME=VALUE, such as solver_order=3", param, ctx)
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

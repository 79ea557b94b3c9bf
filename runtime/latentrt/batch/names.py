"""Names of image files from templates, such as `{sampler}/{index:04}-{prompt}.png`.

A template is a path with fields in braces, which may have a format specification of Python's. The value of a field is
made safe for file names on Linux, macOS and Windows: it never holds a separator, a control character or a trailing dot,
never stands for a parent folder or a device, and is cut to `MAX_VALUE_BYTES`. The rest of the template is the caller's
own and stays as it is.
"""

from __future__ import annotations

import os
import re
import string
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path, PurePath
from typing import Any

from latentrt.bundle.printable import quote
from latentrt.errors import RequestError

__all__ = ["FIELDS", "MAX_VALUE_BYTES", "NameTemplate", "safe_value"]

MAX_VALUE_BYTES = 100
"""Longest value of a field in UTF-8: file systems allow 255 bytes for a name."""

_LARGEST = 2**63 - 1
# Field → a value of its type, by which a format specification is checked, and its meaning.
FIELDS: Mapping[str, tuple[Any, str]] = {
    "index": (_LARGEST, "number of the image in the run, from 0"),
    "seed": (_LARGEST, "seed of the image"),
    "prompt": ("", "prompt, shortened"),
    "sampler": ("", "sampler's name"),
    "steps": (0, "denoising steps"),
    "guidance_scale": (0.0, "guidance scale"),
    "width": (0, "width in pixels"),
    "height": (0, "height in pixels"),
    "date": (date(2000, 1, 1), "today, as in 2026-01-31"),
}
# Names of devices on Windows, in any folder and with any extension.
_RESERVED = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in "0123456789¹²³")}
_FORBIDDEN = '<>:"/\\|?*'
_MAX_SPEC = 20  # characters of a format specification


@dataclass(frozen=True)
class NameTemplate:
    """A parsed template.

    Args:
        text: the template as given, `{{` and `}}` for braces.

    Attributes:
        fields: the fields in it.

    Raises:
        RequestError: a field is unknown, its format specification is not valid, or a brace has no partner.
    """

    text: str

    def __post_init__(self) -> None:
        for _, field, spec, conversion in self._parse():
            if field is None:
                continue
            if field not in FIELDS or conversion:
                raise self._error(
                    f"has the field {quote('{' + field + ('!' + conversion if conversion else '') + '}')}"
                )
            try:
                # A width of many digits, which may be those of any script, would make a name of that length.
                if len(spec or "") > _MAX_SPEC or re.search(r"[^\D0]\d\d", spec or "") or "{" in (spec or ""):
                    raise ValueError
                format(FIELDS[field][0], spec or "")
            except (ValueError, OverflowError):
                raise self._error(f"has the field {quote(field)} with the format {quote(spec)}") from None

    @property
    def fields(self) -> set[str]:
        """The fields in the template."""
        return {field for _, field, *_ in self._parse() if field is not None}

    @property
    def extension(self) -> str:
        """The extension that the template ends with, such as `.png`; empty where it has none, or ends with a field."""
        tail = ""
        for literal, field, *_ in self._parse():
            tail = tail + literal if field is None else "field"
        return PurePath(tail).suffix

    def fill(self, values: Mapping[str, Any]) -> Path:
        """Return the path of an image.

        Args:
            values: of every field.
        """
        names, filled = [""], [False]  # of each component of the path
        for literal, field, spec, _ in self._parse():
            first, *others = literal.replace(os.sep, "/").split("/")
            names[-1] += first
            names += others
            filled += [False] * len(others)
            if field is not None:
                names[-1] += safe_value(format(values[field], spec or ""))
                filled[-1] = True
        safe = [_avoid_device(name) if changed else name for name, changed in zip(names, filled, strict=True)]
        return Path("/".join(safe))

    def _parse(self) -> list[tuple[str, str | None, str | None, str | None]]:
        try:
            return list(string.Formatter().parse(self.text))
        except ValueError as error:
            raise self._error(f"cannot be read ({error}); write {{{{ and }}}} for braces") from None

    def _error(self, problem: str) -> RequestError:
        known = ", ".join("{" + name + "}" for name in FIELDS)
        return RequestError(f"`output`: got {quote(self.text)}, which {problem}, expected {known}, as in {{index:04}}")


def safe_value(text: str) -> str:
    """Return a text as a part of a file name: never empty, and safe on every system. Spaces become hyphens."""
    text = unicodedata.normalize("NFC", "-".join(text.split()))
    text = "".join("_" if each in _FORBIDDEN or not each.isprintable() else each for each in text)
    # A leading dot hides a file, and Windows drops trailing ones.
    encoded = text.lstrip(".").encode("utf-8", "replace")[:MAX_VALUE_BYTES]
    return encoded.decode("utf-8", "ignore").rstrip(".") or "_"


def _avoid_device(name: str) -> str:
    stem, dot, extension = name.partition(".")
    return f"{stem}_{dot}{extension}" if stem.rstrip(" ").upper() in _RESERVED else name

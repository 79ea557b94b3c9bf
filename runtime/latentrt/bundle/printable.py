"""Escapes text of unknown origin before it is printed.

A manifest, a file name or an image's metadata may contain terminal escapes, bells, or characters that reverse the
direction of the line.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["counted", "did_you_mean", "escape", "printable", "quote"]

_MAX_QUOTE = 120  # characters of a value
# Invisible, but they join letters in Persian and Hindi, and sequences of emoji; they affect their neighbours only.
_JOINERS = "\u200c\u200d"


def printable(text: str, keep: str = "") -> str:
    """Escape every character that a terminal would interpret instead of showing (`\\x1b`).

    Args:
        keep: characters that are not escaped, such as a newline in a text of several lines.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS or c in keep else escape(c) for c in text)


def escape(character: str) -> str:
    """Return the escape of a character: `\\x1b`, `\\u4e2d`."""
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def quote(value: object) -> str:
    """Format a value for an error message: its `repr`, abbreviated; the name of its type where that fails."""
    try:
        text = repr(value)
    except Exception:  # of a caller's own class; Python refuses a whole number of more than 4,300 digits as well
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _MAX_QUOTE else f"{text[:_MAX_QUOTE]}…"


def counted(number: int, thing: str) -> str:
    """Format a count, such as `1 engine` or `2 engines`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint at the known name that is spelled like `name`: `; did you mean run?`. Empty if there is none."""
    import difflib  # only on errors

    near = difflib.get_close_matches(name, [*known], n=1)
    return f"; did you mean {near[0]}?" if near else ""

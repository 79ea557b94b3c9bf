"""How is text of unknown origin shown?

A manifest, a file name or a picture's metadata may carry terminal escapes, bells, or characters that reverse the
direction of the line. Whatever is shown to a person goes through here.
"""

from __future__ import annotations

__all__ = ["counted", "printable"]

# Invisible, but they join letters in Persian and Hindi, and emoji into one; they can only change the look of their
# neighbours.
_JOINERS = "\u200c\u200d"


def printable(text: str, keep: str = "") -> str:
    """`text` with every character that a terminal would obey instead of showing written as its escape (`\\x1b`).

    Args:
        keep: characters that pass all the same, such as a newline where the text may have several lines.
    """
    return "".join(c if c.isprintable() or c in _JOINERS or c in keep else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def counted(number: int, thing: str) -> str:
    """`1 engine`, `2 engines`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"

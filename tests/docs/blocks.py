"""The fenced blocks of the documentation's pages, and how each is run.

A `console` block holds commands after `$ `, each followed by the output that it prints, with `...` for any text. A
`python` block is run in the namespace of its page. A comment before a block says otherwise:

    <!-- needs: network -->     it is not run; the reason is one of `NEEDS`
    <!-- file: prompts.txt -->  its text is written to that file
    <!-- without: gpu -->       what it shows is a machine's without a GPU; on others its output is not compared
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["NEEDS", "Block", "Command", "commands", "pages", "read_blocks"]

ROOT = Path(__file__).parents[2]
# What a block needs that the tests do not have, and where its commands are run, if anywhere.
NEEDS = {
    "network": "downloads packages or models",
    "checkpoint": "a checkpoint or bundle that is not in the repository; the options are those of tests/export",
    "container": "a container engine",
    "gpu": "a GPU",
    "shell": "changes the user's shell, or runs until it is stopped",
    "minutes": "takes minutes: `make demo`, or a benchmark that `make bench` and its page name",
}
_FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<key>needs|file|without): (?P<value>[^\n]+?) -->\n(?P=indent))?"
    r"```(?P<language>[a-z]+)\n(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block.

    Attributes:
        line: of its first line in the page, from 1.
        needs: why it is not run; None if it is. file: where its text is written; None if nowhere.
        without: what a machine lacks whose output it shows, `gpu`; None if that makes no difference.
    """

    language: str
    text: str
    line: int
    needs: str | None = None
    file: str | None = None
    without: str | None = None


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command of a block, and the output that the page shows; None where it shows none."""

    text: str
    output: str | None


def pages() -> list[Path]:
    """Return every page of the site that is written by hand, and the repository's own README and CONTRIBUTING."""
    # `make docs` leaves pages that it generates, and the bundle that a notebook exports.
    made = {"generated", "exported-sample"}
    written = (path for path in (ROOT / "docs").rglob("*.md") if not made & {*path.parts})
    return sorted([*written, ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def read_blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, except directives."""
    text = page.read_text()
    for found in _FENCE.finditer(text):
        key, value = found["key"], found["value"]
        yield Block(
            language=found["language"],
            text=found["text"],
            line=text.count("\n", 0, found.start("text")) + 1,
            needs=value if key == "needs" else None,
            file=value if key == "file" else None,
            without=value if key == "without" else None,
        )


def commands(block: Block) -> list[Command]:
    """Return the commands of a `console` block.

    Raises:
        ValueError: it does not begin with `$ `.
    """
    found: list[Command] = []
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        last = next(index for index, line in enumerate(lines) if not line.endswith("\\"))
        output = "\n".join(lines[last + 1 :])
        found.append(Command(text="\n".join(lines[: last + 1]), output=output or None))
    if not found or not block.text.startswith("$ "):
        raise ValueError(f"line {block.line}: a console block has its commands after `$ `")
    return found

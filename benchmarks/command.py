"""The command line of a benchmark, and its report."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

__all__ = ["FOLDER", "PATH", "REPORT", "benchmark", "command_line", "write_report"]

PATH = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
REPORT = "the JSON report"


def benchmark(module: str, doc: str | None) -> Callable[[Callable[..., None]], click.Command]:
    """Return a decorator that makes a command of a function; its help is the module's docstring, line by line.

    Args:
        module: the name under which `python -m` runs it.
        doc: the docstring of the module.
    """
    text = "\n\n".join(f"\b\n{paragraph}" for paragraph in (doc or "").strip().split("\n\n"))
    return click.command(
        f"python -m {module}", help=text, context_settings={"show_default": True, "max_content_width": 120}
    )


def command_line(module: str) -> str:
    """Return the command that runs, for a report."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def write_report(path: Path, report: Any) -> None:
    """Write a report as JSON, into a folder that is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")

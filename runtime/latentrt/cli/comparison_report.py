"""How is a comparison of samplers shown: on a sheet, in a table, as figures?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click
from PIL.Image import Image

from latentrt.bundle.printable import counted, printable
from latentrt.comparison import Cell, first_order
from latentrt.images.contact_sheet import contact_sheet
from latentrt.pipeline import Pipeline

__all__ = ["figures", "print_table", "sheet"]


def print_table(cells: Sequence[Cell]) -> None:
    """The words below each picture, in rows and columns, then why what is refused is refused."""
    counts, rows = _grid(cells)
    table = [["sampler", *(counted(count, "step") for count in counts)]]
    table += [[printable(name), *map(_words, row)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        click.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    for reason, refused in _refused(cells).items():
        which = [f"{printable(name)} in {', '.join(steps)}" for name, steps in refused.items()]
        click.echo(f"refused: {'; '.join(which)}: {reason}")


def _refused(cells: Sequence[Cell]) -> dict[str, dict[str, list[str]]]:
    """Reason → sampler → step counts."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        if cell.order is None:
            reasons.setdefault(cell.refusal, {}).setdefault(cell.sampler, []).append(counted(cell.steps, "step"))
    return reasons


def _words(cell: Cell) -> str:
    """What is said of a cell, in the table and below its picture."""
    if cell.order is None:
        return "refused"
    seconds = cell.median_seconds
    words = [f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.2f} s"]
    if cell.evaluations != cell.steps:
        words.append(f"{cell.evaluations} evaluations")
    if right := cell.figures.get("wholly right"):
        words.append(f"{right.right} of {right.of} right")
    if cell.flagged:
        words.append("flagged")
    return ", ".join(words)


def sheet(cells: Sequence[Cell]) -> Image:
    """The pictures, a row for each sampler, and the same words below them."""
    counts, rows = _grid(cells)
    return contact_sheet(
        [cell.picture for cell in cells],
        [_words(cell) if cell.order else f"refused: {printable(cell.refusal.partition(';')[0])}" for cell in cells],
        columns=len(counts),
        row_headings=[printable(name) for name in rows],
        column_headings=[counted(count, "step") for count in counts],
    )


def _grid(cells: Sequence[Cell]) -> tuple[list[int], dict[str, list[Cell]]]:
    """Step counts, and each sampler's row."""
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.sampler, []).append(cell)
    return [cell.steps for cell in next(iter(rows.values()))], rows


def figures(pipeline: Pipeline, cells: Sequence[Cell], threads: int | None) -> dict[str, Any]:
    """All of it for another program. Seconds are of one picture; `right_of` is how many are right, of how many."""
    order = first_order(cells)
    return {
        "bundle": {"name": pipeline.bundle.manifest.source.name, "digest": pipeline.bundle.digest},
        "runs_on": dict(pipeline.runs_on),
        "threads": threads,
        "asked": {
            "prompt": order.prompts and order.prompts[0],
            "negative_prompt": order.negative_prompts and order.negative_prompts[0],
            "seed": order.seeds[0],
            "guidance_scale": order.guidance_scale,
            "width": order.width,
            "height": order.height,
            "safety": order.safety,
        },
        "cells": [_cell_figures(cell) for cell in cells],
    }


def _cell_figures(cell: Cell) -> dict[str, Any]:
    named = {"sampler": cell.sampler, "steps": cell.steps}
    if cell.order is None:
        return {**named, "refused": cell.refusal}
    return {
        **named,
        "evaluations": cell.evaluations,
        "seconds": round(cell.median_seconds, 4),
        "runs_seconds": [round(seconds, 4) for seconds in cell.seconds],
        "flagged": cell.flagged,
        "right_of": {name: [figure.right, figure.of] for name, figure in cell.figures.items()},
    }

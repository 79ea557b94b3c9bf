"""The command `latentrt compare`: samplers and step counts side by side, on one sheet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.bundle.printable import quote
from latentrt.cli.command import command, describe_values, option, settings
from latentrt.cli.output import echo
from latentrt.cli.prompts import prompt_argument
from latentrt.cli.request_options import LoadOptions, given_options, load_options, request_options, samplers
from latentrt.cli.values import BundlePath, Suggested

if TYPE_CHECKING:
    from latentrt.cli.comparison import Cell
    from latentrt.pipeline import Pipeline

__all__ = ["compare"]

_PROMPT = "a large red heart above a small white circle on a black background"


class _List(Suggested):
    """A list of values separated by commas; duplicates are dropped.

    Args:
        name: of the type, for help and messages.
        kind: of each value; None: the name of a sampler.
    """

    def __init__(self, name: str, kind: click.IntRange | None = None) -> None:
        super().__init__(samplers if kind is None else tuple, several=True)
        self.name, self._kind = name, kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):  # click may convert twice
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(parts):
            self.fail(f"got {quote(value)}, expected {self.name}", param, ctx)
        return tuple(dict.fromkeys(self._convert(part, param, ctx) for part in parts))

    def _convert(self, part: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if self._kind is None:
            return part
        try:
            return self._kind(part, param, ctx)
        except click.BadParameter:
            self.fail(f"got {quote(part)}, expected {describe_values(self._kind)}", param, ctx)


@command(
    examples=(
        "latentrt compare -o compare.png",
        'latentrt compare my-bundle "a lighthouse" --samplers euler,heun,unipc --steps 5,10,25',
        "latentrt compare sample --samplers all --steps 10 --json > compare.json",
    )
)
@click.argument("bundle", type=BundlePath(), required=False)
@prompt_argument
@option(
    "--samplers",
    "names",
    type=_List("NAME,NAME,…"),
    group="Comparison",
    help="One row each: names that `latentrt samplers` lists, or `all`. By default the bundle's own, and of ddim, "
    "euler, euler_a, heun, dpmpp_2m, dpmpp_2m_karras, dpmpp_sde and unipc those that suit it.",
)
@option(
    "--steps",
    "counts",
    type=_List("N,N,…", click.IntRange(min=1)),
    default="5,10,25",
    group="Comparison",
    help="One column each.",
)
@option(
    "--runs", type=click.IntRange(min=1), default=1, group="Comparison", help="Runs per image; the median is shown."
)
@option("--seed", type=int, default=7, group="Image", help="Seed of the initial noise, the same for all.")
@request_options("negative_prompt", "width", "height", "guidance_scale", "safety")
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    group="Output",
    help="The sheet: a .png, .jpg or .webp.  [default: compare.png, or the next free name]",
)
@option("--overwrite", is_flag=True, group="Output", help="Replace an existing file.")
@load_options
def compare(
    bundle: Path | None,
    names: tuple[str, ...] | None,
    counts: tuple[int, ...],
    prompt: str | None,
    seed: int,
    output: Path | None,
    overwrite: bool,
    runs: int,
    machine: LoadOptions,
    **options: Any,
) -> None:
    """Generate one prompt from BUNDLE with several samplers and step counts, all from the same noise, and lay the
    images out on one sheet: a row for each sampler, a column for each step count.

    The caption of each image is its time: text encoding, sampling, decoding and the safety check, on a warm pipeline.
    The cell of a combination that a sampler does not support is grey, with the reason.

    Without BUNDLE, the sample bundle is used.
    """
    from latentrt.cli.comparison import first_request, make_document, make_sheet, plan_cells, print_table
    from latentrt.cli.destinations import choose_file
    from latentrt.cli.document import echo_document
    from latentrt.images.files import save
    from latentrt.request import Request

    prompt = _PROMPT if prompt is None else prompt
    place = choose_file(output, "compare.png", overwrite=overwrite)
    pipeline = machine.load(bundle)
    request = Request.of(prompt=prompt, seed=seed, **given_options(options))
    cells = plan_cells(pipeline, request, _choose_samplers(pipeline, names), counts)
    cells = _generate(pipeline, cells, runs)
    save(make_sheet(cells), place)
    if settings().json:
        echo_document(make_document(pipeline, cells, machine.threads, place))
    elif not settings().quiet:
        print_table(cells)
        echo(f"{place}: {prompt!r}, seed {first_request(cells).seeds[0]}")


def _choose_samplers(pipeline: Pipeline, names: tuple[str, ...] | None) -> Sequence[str]:
    """Return the named samplers, all that suit the model for `all`, or the default ones."""
    from latentrt.cli.comparison import default_samplers, suiting_samplers

    model = pipeline.family.scheduler.class_name
    if names == ("all",):
        return suiting_samplers(model)
    return names or default_samplers(model)


def _generate(pipeline: Pipeline, cells: Sequence[Cell], runs: int) -> list[Cell]:
    from latentrt.cli.comparison import generate_cell, warm_up
    from latentrt.cli.progress import Progress

    with _drop_repeated_warnings(), Progress() as progress:
        task = progress.task("sampling", sum(cell.evaluations for cell in cells) * runs)
        warm_up(pipeline, cells)
        return [generate_cell(pipeline, cell, runs=runs, progress=task.advance) for cell in cells]


@contextmanager
def _drop_repeated_warnings() -> Iterator[None]:
    """Log equal warnings of the pipeline once within the block, not for every image."""
    seen = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.getMessage() in seen
        seen.add(record.getMessage())
        return not known

    logger = logging.getLogger("latentrt")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)

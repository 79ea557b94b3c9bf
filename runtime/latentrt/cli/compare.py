"""The command `latentrt compare`: samplers and step counts side by side, on one sheet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.cli.command import command
from latentrt.cli.output import echo

if TYPE_CHECKING:
    from latentrt.backends.placement import Device
    from latentrt.cli.comparison import Cell
    from latentrt.pipeline import Pipeline

__all__ = ["compare"]

_PROMPT = "a large red heart above a small white circle on a black background"


class _List(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """A list of values separated by commas; duplicates are dropped."""

    def __init__(self, name: str, value: type[str] | click.IntRange) -> None:
        self.name, self._value = name, value

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        parts = [part.strip() for part in value.split(",")]
        if not all(parts):
            self.fail(f"got {value!r}, expected {self.name}", param, ctx)
        if isinstance(self._value, click.IntRange):
            return tuple(dict.fromkeys(self._value.convert(part, param, ctx) for part in parts))
        return tuple(dict.fromkeys(parts))


@command(examples=())
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--samplers",
    "names",
    type=_List("NAME,NAME,…", str),
    help="One row each: names that `latentrt samplers` lists, or `all`. By default the bundle's own, and of ddim, "
    "euler, euler_a, heun, dpmpp_2m, dpmpp_2m_karras, dpmpp_sde and unipc those that suit it.",
)
@click.option(
    "--steps",
    "counts",
    type=_List("N,N,…", click.IntRange(min=1)),
    default="5,10,25",
    show_default=True,
    help="One column each.",
)
@click.option("--prompt", default=_PROMPT, show_default=True, help="The image's description.")
@click.option("-n", "--negative-prompt", help="Content to avoid.")
@click.option("--seed", type=int, default=7, show_default=True, help="Seed of the initial noise, the same for all.")
@click.option("--guidance-scale", type=float, help="Guidance is off at 1 and below. The bundle's by default.")
@click.option("--height", type=int, help="In pixels. The bundle's default by default.")
@click.option("--width", type=int, help="In pixels.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("compare.png"),
    show_default=True,
    help="The sheet: a .png, .jpg or .webp.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the times to a file.")
@click.option(
    "--runs", type=click.IntRange(min=1), default=1, show_default=True, help="Runs per image; the median is shown."
)
@click.option("--safety", help="Policy for a flagged image: block, blur or report; off checks no image.")
@click.option("--digest", metavar="sha256:…", help="Expected digest of bundle.json.")
@click.option(
    "--device", default="auto", show_default=True, help="auto, cpu or cuda (ONNX Runtime), openvino or tensorrt."
)
@click.option("--provider", help="One of ONNX Runtime's execution providers, by its name.")
@click.option("--threads", type=click.IntRange(min=1), help="On the CPU. One per core by default.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def compare(
    bundle: Path | None,
    names: tuple[str, ...] | None,
    counts: tuple[int, ...],
    prompt: str,
    negative_prompt: str | None,
    seed: int,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    output: Path,
    json_path: Path | None,
    runs: int,
    safety: str | None,
    digest: str | None,
    device: Device,
    provider: str | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Generate one prompt from BUNDLE with several samplers and step counts, all from the same noise, and lay the
    images out on one sheet: a row for each sampler, a column for each step count.

    The caption of each image is its time: text encoding, sampling, decoding and the safety check, on a warm pipeline.
    The cell of a combination that a sampler does not support is grey, with the reason.

    Without BUNDLE, the sample bundle is used.
    """
    from latentrt.cli.comparison import first_request, make_report, make_sheet, plan_cells, print_table
    from latentrt.cli.report import check_report, write_report
    from latentrt.images.files import check_output, save
    from latentrt.pipeline import Pipeline
    from latentrt.request import Request

    if json_path is not None and Path(json_path).resolve() == Path(output).resolve():
        raise click.BadParameter(f"got {json_path}, which is the image's; choose another", param_hint="--json")
    check_output(output)
    check_report(json_path)
    pipeline = Pipeline.load(bundle, device=device, digest=digest, threads=threads, provider=provider)
    request = Request.of(
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        guidance_scale=guidance_scale,
        seed=seed,
        safety=safety,
    )
    cells = plan_cells(pipeline, request, _choose_samplers(pipeline, names), counts)
    cells = _generate(pipeline, cells, runs, quiet=quiet)
    if not quiet:
        print_table(cells)
    if json_path is not None:
        write_report(json_path, make_report(pipeline, cells, threads))
    save(make_sheet(cells), output)
    if not quiet:
        echo(f"{output}: {prompt!r}, seed {first_request(cells).seeds[0]}")


def _choose_samplers(pipeline: Pipeline, names: tuple[str, ...] | None) -> Sequence[str]:
    """Return the named samplers, all that suit the model for `all`, or the default ones."""
    from latentrt.cli.comparison import default_samplers, suiting_samplers

    model = pipeline.family.scheduler.class_name
    if names == ("all",):
        return suiting_samplers(model)
    return names or default_samplers(model)


def _generate(pipeline: Pipeline, cells: Sequence[Cell], runs: int, *, quiet: bool) -> list[Cell]:
    from latentrt.cli.comparison import generate_cell, warm_up
    from latentrt.cli.progress import progress_bar

    with _drop_repeated_warnings(), progress_bar(quiet=quiet) as bar:
        task = bar.add_task("", total=sum(cell.evaluations for cell in cells) * runs)
        warm_up(pipeline, cells)
        return [
            generate_cell(pipeline, cell, runs=runs, progress=lambda count: bar.advance(task, count)) for cell in cells
        ]


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

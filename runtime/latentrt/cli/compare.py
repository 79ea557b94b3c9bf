"""The command `latentrt compare`: samplers and step counts side by side, on one sheet."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentrt.errors import RequestError

if TYPE_CHECKING:
    from latentrt.backends.device import Device
    from latentrt.comparison import Cell
    from latentrt.pipeline import Pipeline
    from latentrt.sample.prompts import Prompt

__all__ = ["compare"]

_PROMPT = "a large red heart above a small white circle on a black background"
_QUALITY = 16  # prompts for the judge, where nobody says how many


class _List(click.ParamType):  # type: ignore[type-arg]  # generic for type checkers only
    """Values with commas between them, each once."""

    def __init__(self, name: str, value: type[str] | click.IntRange) -> None:
        self.name, self._value = name, value

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        parts = [part.strip() for part in value.split(",")]
        if not all(parts):
            self.fail(f"found {value!r}, expected {self.name}", param, ctx)
        if isinstance(self._value, click.IntRange):
            return tuple(dict.fromkeys(self._value.convert(part, param, ctx) for part in parts))
        return tuple(dict.fromkeys(parts))


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--samplers",
    "names",
    type=_List("NAME,NAME,…", str),
    help="A row each, by any name that `latentrt samplers` knows, or `all`. By default the bundle's own, and of ddim, "
    "euler, euler_a, heun, dpmpp_2m, dpmpp_2m_karras, dpmpp_sde and unipc those that suit it.",
)
@click.option(
    "--steps",
    "counts",
    type=_List("N,N,…", click.IntRange(min=1)),
    default="5,10,25",
    show_default=True,
    help="A column each.",
)
@click.option("--prompt", default=_PROMPT, show_default=True, help="What to draw.")
@click.option("-n", "--negative-prompt", help="What to keep out of the pictures.")
@click.option("--seed", type=int, default=7, show_default=True, help="Of the first noise, the same for all.")
@click.option("--guidance-scale", type=float, help="Up to 1 there is no guidance. The bundle's by default.")
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
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the figures there, too.")
@click.option(
    "--runs", type=click.IntRange(min=1), default=1, show_default=True, help="Times each is drawn; the median is shown."
)
@click.option(
    "--quality",
    type=click.IntRange(min=0),
    help=f"Prompts to judge each on; 0: none. For the sample model only, and there {_QUALITY} by default.",
)
@click.option("--safety", help="What is done with a flagged picture: block, blur, report; off checks nothing.")
@click.option("--digest", metavar="sha256:…", help="What bundle.json must hash to.")
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
    quality: int | None,
    safety: str | None,
    digest: str | None,
    device: Device,
    provider: str | None,
    threads: int | None,
    quiet: bool,
) -> None:
    """Draw one prompt from BUNDLE by several samplers in several numbers of steps, all from the same noise, and lay the
    pictures out on one sheet: a row for each sampler, a column for each number of steps.

    Below each picture stands how long one takes: text, denoising, decoding and the safety check, on a pipeline that has
    drawn before. What a sampler cannot do stays grey and says why.

    Without BUNDLE, the sample bundle is drawn from. Pictures of the sample model are also judged: of how many prompts
    that training never saw they show everything.
    """
    from latentrt.cli.comparison_report import figures, print_table, sheet
    from latentrt.cli.report import check_report, write_report
    from latentrt.comparison import plan
    from latentrt.images.files import check_output, save
    from latentrt.pipeline import Pipeline
    from latentrt.request import Request

    check_output(output)
    check_report(json_path)
    pipeline = Pipeline.load(bundle, device=device, digest=digest, threads=threads, provider=provider)
    request = Request(
        prompt=prompt,
        negative_prompt=negative_prompt,
        height=height,
        width=width,
        guidance_scale=guidance_scale,
        seed=seed,
        safety=safety,
    )
    cells = plan(pipeline, request, _names(pipeline, names), counts)
    prompts = _prompts(pipeline, cells, quality)
    cells = _draw(pipeline, cells, runs, prompts, quiet=quiet)
    if not quiet:
        print_table(cells)
    if json_path is not None:
        write_report(json_path, figures(pipeline, cells, threads))
    save(sheet(cells), output)
    if not quiet:
        click.echo(f"{output}: {prompt!r}, seed {seed}")


def _names(pipeline: Pipeline, asked: tuple[str, ...] | None) -> Sequence[str]:
    from latentrt.comparison import default_samplers, suiting_samplers

    model = pipeline.bundle.manifest.schedulers["unet"].class_name
    if asked == ("all",):
        return suiting_samplers(model)
    return asked or default_samplers(model)


def _prompts(pipeline: Pipeline, cells: Sequence[Cell], asked: int | None) -> list[Prompt]:
    """What the judge is asked about. It knows the sample model's pictures only, and only in their own size."""
    from latentrt.comparison import first_order
    from latentrt.sample import is_sample_model
    from latentrt.sample.figures import PROMPT_SEED
    from latentrt.sample.outlines import EDGE
    from latentrt.sample.prompts import held_out_prompts

    manifest, order = pipeline.bundle.manifest, first_order(cells)
    sizes = {order.width, order.height, manifest.defaults.width, manifest.defaults.height}
    known = sizes == {EDGE} and is_sample_model(manifest)
    if asked and not known:
        raise RequestError(
            f"found --quality {asked}, but the judge reads pictures of the sample model only, of {EDGE} × {EDGE}; "
            "leave it out, or leave BUNDLE and the size out to compare samplers on the sample bundle"
        )
    return held_out_prompts((_QUALITY if known else 0) if asked is None else asked, PROMPT_SEED)


def _draw(
    pipeline: Pipeline, cells: Sequence[Cell], runs: int, prompts: Sequence[Prompt], *, quiet: bool
) -> list[Cell]:
    from latentrt.cli.drawing import drawing_progress
    from latentrt.comparison import drawn, judged, warm_up

    with _said_once(), drawing_progress(quiet=quiet) as bar:
        task = bar.add_task("", total=sum(cell.evaluations for cell in cells) * (runs + len(prompts)))

        def progress(evaluations: int) -> None:
            bar.advance(task, evaluations)

        warm_up(pipeline, cells)
        # All that is timed first: batches of other sizes between them would cost the next picture its warmth.
        cells = [drawn(pipeline, cell, runs=runs, progress=progress) for cell in cells]
        return [judged(pipeline, cell, prompts, progress) for cell in cells]


@contextmanager
def _said_once() -> Iterator[None]:
    """The pipeline's warnings are about a picture; of many that are alike, one is enough."""
    said = set[str]()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.getMessage() in said
        said.add(record.getMessage())
        return not known

    logger = logging.getLogger("latentrt")
    logger.addFilter(is_new)
    try:
        yield
    finally:
        logger.removeFilter(is_new)

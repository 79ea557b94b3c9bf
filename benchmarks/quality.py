"""Scores bundles of the sample model by how well images match their prompts.

    .venv/bin/python -m benchmarks.quality                                     # the bundle in the runtime's package
    .venv/bin/python -m benchmarks.quality --graph float32 --graph float16     # two graphs of it, side by side
    .venv/bin/python -m benchmarks.quality my-bundle other-bundle --sampler euler --steps 10

One column for each bundle and graph; each after the first is also compared with the first, prompt by prompt. A
classical judge (`sample/judge.py`) reads the images; the safety graph runs on images that it should flag and on others.
Bars (`sample/bars.py`) are for 25 steps of DDIM with guidance 5 and are shown at these settings only; `--bars` fails if
one is missed, as some are with too few prompts. About 8 minutes a column on two CPU cores.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any, get_args

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.command import PATH, REPORT, benchmark, command_line, write_report
from benchmarks.full_size import machine
from latentrt import Bundle, Pipeline
from latentrt.backends.models import Components
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.placement import Device, Placement, place_components
from latentrt.bundle.manifest import Precision
from latentrt.bundle.sample import bundle_path
from latentrt.errors import LatentRTError
from latentrt.sampling.samplers import SAMPLERS
from sample import quality
from sample.bars import BARS, missed_bars
from sample.judge import Reading
from sample.outlines import EDGE
from sample.prompts import held_out_prompts
from sample.quality import PROMPT_SEED, Score, Settings, compare_readings, read_images, score_prompts


@dataclass(frozen=True)
class Column:
    """The scores of one graph of a bundle; `weights` are the SHA-256 of the checkpoint's files."""

    name: str
    weights: dict[str, str]
    seconds: float
    scores: dict[str, Score]
    readings: list[Reading]


@benchmark("benchmarks.quality", __doc__)
@click.argument("bundles", metavar="[BUNDLE]...", type=PATH, nargs=-1)
@click.option(
    "--graph",
    "graphs",
    multiple=True,
    type=click.Choice(["float32", "float16", "int8"]),
    help="by default float32, or int8 for a bundle of int8; may be repeated",
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    type=click.Choice(["openvino", "cuda", "tensorrt"]),
    help="a backend in addition to the graphs; may be repeated. Build engines with --batch 1..32 --guidance both",
)
@click.option("--prompts", type=click.IntRange(4), default=256, help="number of prompts")
@click.option("--safety-images", type=click.IntRange(0), default=512, help="images of each kind; 0 for none")
@click.option("--steps", type=click.IntRange(1), default=25)
@click.option("--guidance-scale", type=float, default=5.0, help="0 or more")
@click.option("--sampler", type=click.Choice(sorted(SAMPLERS)), default="ddim")
@click.option("--bars", is_flag=True, help="exit with 1 if a bar is missed")
@click.option("--output", type=PATH, help=REPORT)
def main(**given: Any) -> None:
    arguments = SimpleNamespace(**given)
    if not arguments.guidance_scale >= 0:  # also for NaN, which is in any range of click's
        raise click.UsageError(f"got --guidance-scale {arguments.guidance_scale}, expected 0 or more")
    settings = Settings(arguments.steps, arguments.guidance_scale, arguments.sampler)
    console = Console()
    columns = []
    for bundle, graph in open_bundles(arguments):
        columns.append(measure(bundle, graph, settings, arguments.prompts, arguments.safety_images, console))
    prompts = held_out_prompts(arguments.prompts, PROMPT_SEED)
    for column in columns[1:]:
        names = "right here, wrong in the first", "wrong here, right in the first"
        scores = compare_readings(prompts, column.readings, columns[0].readings)
        column.scores.update(zip(names, scores, strict=True))
    with_bars = settings == Settings()
    console.print(as_table(columns, with_bars=with_bars))
    failures = [f"{column.name}: {bar}" for column in columns if with_bars for bar in missed_bars(column.scores)]
    for failure in failures:
        console.print(f"missed: {failure}", highlight=False, soft_wrap=True)
    if arguments.output:
        report = {
            "command": command_line("benchmarks.quality"),
            "machine": machine(),
            "settings": asdict(settings),
            "columns": [
                {
                    "name": column.name,
                    "weights": column.weights,
                    "seconds": round(column.seconds, 1),
                    "right_of": {key: [value.right, value.of] for key, value in column.scores.items()},
                }
                for column in columns
            ],
        }
        write_report(arguments.output, report)
    if failures and arguments.bars:
        sys.exit(1)


def open_bundles(arguments: SimpleNamespace) -> list[tuple[Bundle, Any]]:
    """Return pairs of an opened bundle and the name of a graph or a device."""
    wanted: list[tuple[Bundle, Any]] = []
    for path in arguments.bundles or [bundle_path()]:
        try:
            bundle = Bundle.open(path)
        except LatentRTError as error:
            raise click.UsageError(str(error)) from error
        size = bundle.manifest.defaults.height, bundle.manifest.defaults.width
        if size != (EDGE, EDGE):
            raise click.UsageError(
                f"{path} generates {size[1]} × {size[0]}, expected a bundle of the sample model, {EDGE} × {EDGE}"
            )
        own = "int8" if bundle.manifest.precision == "int8" else "float32"
        wanted += [(bundle, backend) for backend in [*(arguments.graphs or [own]), *arguments.devices]]
    return wanted


def measure(
    bundle: Bundle, backend: Any, settings: Settings, prompts: int, safety_images: int, console: Console
) -> Column:
    """Score a bundle with one of its graphs on ONNX Runtime's CPU, or on another backend."""
    began = time.perf_counter()
    name = f"{bundle.folder.name} {backend}"
    if backend in get_args(Device):
        pipeline = Pipeline(bundle, Components(place_components(bundle, backend)), progress=False)
    else:
        pipeline = Pipeline(bundle, Components(place_on_graph(bundle, backend)), progress=False)
    unguided = replace(settings, guidance_scale=1.0)
    texts = held_out_prompts(prompts, PROMPT_SEED)
    scores: dict[str, Score] = {}
    with Progress(console=console, transient=True) as progress:
        total = 4 * prompts + 3 * (prompts // 2) + 2 * safety_images
        task = progress.add_task(name, total=total)

        def bar(images: int) -> None:
            progress.advance(task, images)

        guided, free = (read_images(pipeline, one, texts, bar) for one in (settings, unguided))
        scores |= score_prompts(texts, guided)
        scores |= {f"{key} (guidance 1)": value for key, value in score_prompts(texts, free).items()}
        scores |= dict(zip(quality.WITH_OR_WITHOUT_GUIDANCE, compare_readings(texts, guided, free), strict=True))
        scores |= quality.guidance(pipeline, settings, texts, bar)
        scores |= quality.negatives(pipeline, settings, prompts // 2, bar)
        if safety_images:
            scores |= quality.safety(pipeline, settings, safety_images, bar)
    return Column(name, dict(bundle.manifest.source.weights), time.perf_counter() - began, scores, guided)


def place_on_graph(bundle: Bundle, precision: Precision) -> dict[str, Placement]:
    """Place every component on ONNX Runtime's CPU, on its graph of a precision, or else float32."""
    return {name: _place(bundle, name, precision) for name in bundle.manifest.components}


def _place(bundle: Bundle, name: str, precision: Precision) -> Placement:
    graph: Precision = precision if precision in bundle.manifest.components[name].graphs else "float32"
    return Placement(
        backend="onnxruntime",
        device="cpu",
        title=f"ONNX Runtime on the CPU, {graph} graph",
        open=lambda part: open_session(bundle, name, precision=graph),
        key=("graph", bundle.digest, name, graph),
    )


def as_table(columns: Sequence[Column], *, with_bars: bool) -> Table:
    """Return a table with a row for each score and a column for each bundle and graph, and optionally the bars."""
    table = Table(box=None, header_style="")
    table.add_column("share of images")
    for column in columns:
        table.add_column("\n".join(column.name.rsplit(" ", 1)), justify="right", no_wrap=True)
    if with_bars:
        table.add_column("bar", justify="right")
    for key in columns[-1].scores:
        scores = (column.scores.get(key) for column in columns)
        cells = [f"{score.share:.1%} of {score.of}" if score else "" for score in scores]
        table.add_row(key, *cells, *([BARS[key].description] if with_bars and key in BARS else []))
    return table


if __name__ == "__main__":
    main()

"""Scores the samplers by how well images of the sample model match their prompts, in few steps and in many.

    .venv/bin/python -m benchmarks.samplers --output benchmarks/results/samplers.json --markdown scratch/samplers.md
    .venv/bin/python -m benchmarks.samplers --samplers euler,DDIM --steps 2,3,4 --prompts 64 --output scratch/few.json

Every sampler that suits the model generates images of the same held-out prompts from the same noise, with the bundle's
own guidance scale, and a classical judge reads the images. Results in an existing report are not measured again, so an
interrupted run resumes. About two minutes for each sampler on two CPU cores, four where a step has two evaluations.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import click
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.command import PATH, REPORT, benchmark
from benchmarks.full_size import machine
from latentrt import Pipeline
from latentrt.bundle.atomic_file import write_atomically
from latentrt.bundle.printable import counted
from latentrt.cli.comparison import Cell, plan_cells, suiting_samplers
from latentrt.errors import LatentRTError
from latentrt.request import Request
from sample.prompts import Prompt, held_out_prompts
from sample.quality import PROMPT_SEED, Settings, fully_right, is_sample_model, read_images, score_prompts

# In addition to every sampler by its own name: common names of variants.
VARIANTS = ("plms", "dpmpp_2m_karras", "dpmpp_2m_sde_karras")
# Score → its heading in the printed table; the report has all of them.
COLUMNS = {
    "fully right": "right",
    "one thing: fully right": "one thing",
    "two things: fully right": "two things",
    "background": "background",
}


@benchmark("benchmarks.samplers", __doc__)
@click.argument("bundle", type=PATH, required=False)
@click.option("--samplers", help="comma-separated; by default all that suit the model")
@click.option("--steps", default="5,10,25", help="comma-separated")
@click.option("--prompts", type=click.IntRange(1), default=256)
@click.option("--output", type=PATH, required=True, help=REPORT)
@click.option("--markdown", type=PATH, help="a table of the shares of fully right images")
def main(**given: Any) -> None:
    arguments = SimpleNamespace(**given)
    resolve(arguments)
    pipeline, cells, report = arguments.pipeline, arguments.cells, arguments.report
    prompts = held_out_prompts(arguments.prompts, PROMPT_SEED)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("generating", total=sum(cell.evaluations for cell in cells) * len(prompts))
        for cell in cells:
            row = report["measured"].setdefault(cell.sampler, {})
            if str(cell.steps) in row:
                progress.advance(task, cell.evaluations * len(prompts))
                continue
            row[str(cell.steps)] = measure(pipeline, cell, prompts, lambda count: progress.advance(task, count))
            write_atomically(arguments.output, (json.dumps(report, indent=2) + "\n").encode())
    console.print(as_table(report["measured"], cells))
    if arguments.markdown:
        arguments.markdown.write_text(as_markdown(report["measured"], arguments.samplers, arguments.steps))


def resolve(arguments: SimpleNamespace) -> None:
    """Add the `pipeline`, the `cells` to measure and the `report` to continue."""
    try:
        arguments.steps = [int(part) for part in arguments.steps.split(",")]
    except ValueError:
        raise click.UsageError(f"got --steps {arguments.steps}, expected whole numbers, comma-separated") from None
    try:
        arguments.pipeline = Pipeline.load(arguments.bundle, device="cpu")
    except LatentRTError as error:
        raise click.UsageError(str(error)) from error
    manifest = arguments.pipeline.bundle.manifest
    if not is_sample_model(manifest):
        raise click.UsageError(f"{arguments.bundle} is not of the sample model; the judge reads no other images")
    names = [name.strip() for name in arguments.samplers.split(",")] if arguments.samplers else None
    arguments.samplers = names or [*suiting_samplers(arguments.pipeline.family.scheduler.class_name), *VARIANTS]
    try:
        request = Request.of(prompt="", seed=0)
        arguments.cells = plan_cells(arguments.pipeline, request, arguments.samplers, arguments.steps)
    except LatentRTError as error:
        raise click.UsageError(str(error)) from error
    arguments.report = read_report(arguments)


def read_report(arguments: SimpleNamespace) -> dict[str, Any]:
    """Return the existing report if it has the same settings, or an empty one if there is none."""
    manifest = arguments.pipeline.bundle.manifest
    settings = {
        "prompts": arguments.prompts,
        "guidance_scale": manifest.defaults.guidance_scale,
        "weights": dict(manifest.source.weights),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.output.exists():
        report: dict[str, Any] = json.loads(arguments.output.read_text())
        if report.get("settings") != settings:
            raise click.UsageError(
                f"{arguments.output} has results for other prompts or weights; move it away to start anew"
            )
        return report
    return {"command": "python -m benchmarks.samplers", "machine": machine(), "settings": settings, "measured": {}}


def measure(pipeline: Pipeline, cell: Cell, prompts: Sequence[Prompt], progress: Any) -> dict[str, Any]:
    """Score one cell, or record the error of the sampler; `seconds` include generating and judging."""
    if cell.request is None:
        return {"refused": cell.refusal}
    began = time.perf_counter()
    settings = Settings(
        steps=cell.steps,
        guidance_scale=cell.request.guidance_scale,
        sampler=cell.sampler,
        safety="off" if cell.request.policy == "off" else "report",
    )
    readings = read_images(pipeline, settings, prompts, lambda images: progress(images * cell.evaluations))
    scores = {"fully right": fully_right(prompts, readings), **score_prompts(prompts, readings)}
    return {
        "evaluations": cell.evaluations,
        "seconds": round(time.perf_counter() - began, 1),
        "right_of": {name: [score.right, score.of] for name, score in scores.items()},
    }


def as_table(measured: dict[str, Any], cells: Sequence[Cell]) -> Table:
    """Return a table with a row for each sampler and number of steps."""
    table = Table(box=None, header_style="")
    table.add_column("sampler", no_wrap=True)
    for name in ("steps", "evaluations", *COLUMNS.values(), "seconds"):
        table.add_column(name, justify="right", no_wrap=True)
    for cell in cells:
        found = measured[cell.sampler][str(cell.steps)]
        if "refused" in found:
            table.add_row(cell.sampler, str(cell.steps), "refused")
            continue
        shares = [_share(*found["right_of"][name]) for name in COLUMNS]
        table.add_row(cell.sampler, str(cell.steps), str(found["evaluations"]), *shares, f"{found['seconds']:.1f}")
    return table


def as_markdown(measured: dict[str, Any], names: Sequence[str], counts: Sequence[int]) -> str:
    """Return the shares of fully right images: a row for each sampler, a column for each number of steps."""
    lines = ["| sampler | " + " | ".join(counted(count, "step") for count in counts) + " |"]
    lines.append("|---|" + "---:|" * len(counts))
    for name in names:
        cells = [_markdown_cell(measured[name][str(count)], count) for count in counts]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _markdown_cell(found: dict[str, Any], count: int) -> str:
    if "refused" in found:
        return "–"
    more = "" if found["evaluations"] == count else f" ({found['evaluations']} evaluations)"
    return _share(*found["right_of"]["fully right"]) + more


def _share(right: int, of: int) -> str:
    return f"{right / of:.1%}" if of else ""


if __name__ == "__main__":
    main()

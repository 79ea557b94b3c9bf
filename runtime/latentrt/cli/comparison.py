"""Comparison of samplers and step counts on one bundle: the same prompt from the same noise for each combination."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from PIL.Image import Image

from latentrt.bundle.printable import counted, printable
from latentrt.cli.command import spelling
from latentrt.cli.document import MachineDocument
from latentrt.cli.output import echo
from latentrt.errors import RequestError
from latentrt.images.contact_sheet import contact_sheet
from latentrt.pipeline import Pipeline
from latentrt.request import Request
from latentrt.resolve import ResolvedRequest
from latentrt.result import Result
from latentrt.sampling import samplers

__all__ = [
    "ORDINARY",
    "SPECIAL",
    "Cell",
    "CompareDocument",
    "default_samplers",
    "first_request",
    "generate_cell",
    "make_document",
    "make_sheet",
    "plan_cells",
    "print_table",
    "suiting_samplers",
    "warm_up",
]

# Compared by default, after the bundle's own sampler, if they suit the model.
ORDINARY = (
    *("ddim", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_sde", "unipc"),
    *("flow_euler", "flow_heun", "edm_euler", "edm_dpmpp_2m"),
)
# Samplers that do not generate well with every model of their kind, and the reason.
SPECIAL = {
    "ddim_inverse": "it goes from an image to its noise",
    "dpmpp_2m_inverse": "it goes from an image to its noise",
    "lcm": "it is for models that were distilled for it",
    "tcd": "it is for models that were distilled for it",
    "flow_lcm": "it is for models that were distilled for it",
    "unclip": "its noise schedule is that of its own models",
}

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One sampler with one number of steps.

    Attributes:
        sampler: its name as the caller wrote it.
        steps: number of steps.
        request: None where the combination is rejected.
        refusal: the reason, where it is.
        evaluations: of the model, for one image.
        seconds: of each run, from the prompt to a checked image, without loading.
        image: of the first run.
        flagged: whether the classifier flagged the image.
    """

    sampler: str
    steps: int
    request: ResolvedRequest | None = None
    refusal: str = ""
    evaluations: int = 0
    seconds: tuple[float, ...] = ()
    image: Image | None = None
    flagged: bool = False

    @property
    def median_seconds(self) -> float:
        """Median over the runs."""
        return statistics.median(self.seconds)


class ComparedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The options that all images of a comparison share."""

    prompt: str | None
    negative_prompt: str | None
    seed: int
    guidance_scale: float
    width: int
    height: int
    safety: str


class ComparedCell(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One image of a comparison, or the reason why there is none.

    Attributes:
        refused: why the sampler does not support the combination; without it, all others are present.
        seconds: median of `runs_seconds`, from the prompt to a checked image.
    """

    sampler: str
    steps: int
    refused: str | None = None
    evaluations: int | None = None
    seconds: float | None = None
    runs_seconds: list[float] | None = None
    flagged: bool | None = None


class CompareDocument(MachineDocument, frozen=True, kw_only=True):
    """The document of `latentrt compare --json`.

    Attributes:
        sheet: the file of the images.
        bundle: the folder. digest: of bundle.json.
        runs_on: a description of the backend by component.
        threads: as given.
    """

    sheet: str
    bundle: str
    digest: str
    runs_on: dict[str, str]
    threads: int | None
    request: ComparedRequest
    cells: list[ComparedCell]


def default_samplers(model: str) -> list[str]:
    """Return the bundle's own sampler and those of `ORDINARY` that suit the model.

    Args:
        model: diffusers class of the bundle's own scheduler.
    """
    own = [name for name in samplers.SAMPLERS if samplers.SAMPLERS[name].class_name == model]
    return [name for name in dict.fromkeys([*own, *ORDINARY]) if _is_suitable(name, model)]


def suiting_samplers(model: str) -> list[str]:
    """Return every sampler that suits the model, except those of `SPECIAL`.

    Args:
        model: diffusers class of the bundle's own scheduler.
    """
    return [name for name in samplers.SAMPLERS if name not in SPECIAL and _is_suitable(name, model)]


def plan_cells(pipeline: Pipeline, request: Request, names: Sequence[str], counts: Sequence[int]) -> list[Cell]:
    """Return the cells, row by row.

    Args:
        request: all options except the sampler and the number of steps. All cells have the seeds of the first, even if
            it is random, so that all start from the same noise.
        names: of the samplers, one row each.
        counts: of steps, one column each.

    Raises:
        RequestError: a sampler is unknown, or every cell is rejected.
        SafetyError: the safety policy needs a classifier, and the bundle has none.
    """
    for name in names:
        samplers.find(name)
    cells = [_plan_cell(pipeline, request, name, count) for name in names for count in counts]
    if all(cell.request is None for cell in cells):
        reasons = list(dict.fromkeys(cell.refusal for cell in cells))
        if len(reasons) == 1:
            raise RequestError(reasons[0])
        raise RequestError("got nothing to generate, as every combination is refused:\n  " + "\n  ".join(reasons))
    seeds = first_request(cells).seeds
    return [
        cell if cell.request is None else replace(cell, request=replace(cell.request, seeds=seeds)) for cell in cells
    ]


def first_request(cells: Sequence[Cell]) -> ResolvedRequest:
    """Return the request of the first cell that is not rejected; the others differ in sampler and steps only."""
    return next(cell.request for cell in cells if cell.request is not None)


def warm_up(pipeline: Pipeline, cells: Sequence[Cell]) -> None:
    """Load every component and run it once, for a single step, so that no timed image is the first."""
    request = first_request(cells)
    steps = pipeline.steps(request)
    latents = next(steps).latents
    steps.close()
    pipeline.finish(request, latents)


def generate_cell(pipeline: Pipeline, cell: Cell, *, runs: int, progress: Progress) -> Cell:
    """Return the cell with its image and times, or unchanged if it is rejected.

    Args:
        runs: number of images to time.
        progress: called with 1 after each evaluation of the model.
    """
    if cell.request is None:
        return cell
    results, seconds = [], []
    for _ in range(runs):
        began = time.perf_counter()
        results.append(_generate(pipeline, cell.request, progress))
        seconds.append(time.perf_counter() - began)
    flagged = any(results[0].nsfw_content_detected or ())
    return replace(cell, image=results[0].images[0], flagged=flagged, seconds=tuple(seconds))


def print_table(cells: Sequence[Cell]) -> None:
    """Print the captions in rows and columns, then the reason of each rejected cell."""
    counts, rows = _grid(cells)
    table = [["sampler", *(counted(count, "step") for count in counts)]]
    table += [[name, *map(_caption, row)] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
    for reason, refused in _refusals(cells).items():
        which = [f"{name} in {', '.join(steps)}" for name, steps in refused.items()]
        echo(f"refused: {'; '.join(which)}: {reason}")


def make_sheet(cells: Sequence[Cell]) -> Image:
    """Return the images on one sheet, a row for each sampler, with their captions."""
    counts, rows = _grid(cells)
    return contact_sheet(
        [cell.image for cell in cells],
        [_caption(cell) if cell.request else f"refused: {printable(cell.refusal.partition(';')[0])}" for cell in cells],
        columns=len(counts),
        row_headings=[printable(name) for name in rows],
        column_headings=[counted(count, "step") for count in counts],
    )


def make_document(pipeline: Pipeline, cells: Sequence[Cell], threads: int | None, sheet: Path) -> CompareDocument:
    """Return the comparison as a document."""
    request = first_request(cells)
    return CompareDocument.here(
        sheet=str(sheet),
        bundle=str(pipeline.bundle.folder),
        digest=pipeline.bundle.digest,
        runs_on={name: str(placement) for name, placement in pipeline.runs_on.items()},
        threads=threads,
        request=ComparedRequest(
            prompt=request.prompts[0] if request.prompts else None,
            negative_prompt=request.negative_prompts[0] if request.negative_prompts else None,
            seed=request.seeds[0],
            guidance_scale=request.guidance_scale,
            width=request.width,
            height=request.height,
            safety=request.policy,
        ),
        cells=[_report_cell(cell) for cell in cells],
    )


def _report_cell(cell: Cell) -> ComparedCell:
    if cell.request is None:
        return ComparedCell(sampler=cell.sampler, steps=cell.steps, refused=cell.refusal)
    return ComparedCell(
        sampler=cell.sampler,
        steps=cell.steps,
        evaluations=cell.evaluations,
        seconds=round(cell.median_seconds, 4),
        runs_seconds=[round(seconds, 4) for seconds in cell.seconds],
        flagged=cell.flagged,
    )


def _generate(pipeline: Pipeline, request: ResolvedRequest, progress: Progress) -> Result:
    for step in pipeline.steps(request):
        latents = step.latents
        progress(1)
    return pipeline.finish(request, latents)


def _is_suitable(name: str, model: str) -> bool:
    try:
        samplers.check_suits(name, model)
    except RequestError:
        return False
    return True


def _plan_cell(pipeline: Pipeline, request: Request, name: str, count: int) -> Cell:
    """Return a cell with its resolved request, or with the reason why that is impossible."""
    try:
        sampling = replace(request.sampling, sampler=name, steps=count)
        resolved = pipeline.resolve(replace(request, sampling=sampling))
    except RequestError as error:
        return Cell(sampler=name, steps=count, refusal=error.describe(spelling()))
    return Cell(sampler=name, steps=count, request=resolved, evaluations=len(resolved.schedule))


def _refusals(cells: Sequence[Cell]) -> dict[str, dict[str, list[str]]]:
    """Return reason → sampler → step counts."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for cell in cells:
        if cell.request is None:
            reasons.setdefault(cell.refusal, {}).setdefault(cell.sampler, []).append(counted(cell.steps, "step"))
    return reasons


def _caption(cell: Cell) -> str:
    if cell.request is None:
        return "refused"
    seconds = cell.median_seconds
    caption = [f"{seconds * 1000:,.0f} ms" if seconds < 1 else f"{seconds:,.2f} s"]
    if cell.evaluations != cell.steps:
        caption.append(f"{cell.evaluations} evaluations")
    if cell.flagged:
        caption.append("flagged")
    return ", ".join(caption)


def _grid(cells: Sequence[Cell]) -> tuple[list[int], dict[str, list[Cell]]]:
    """Return the step counts, and each sampler's row."""
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.sampler, []).append(cell)
    return [cell.steps for cell in next(iter(rows.values()))], rows

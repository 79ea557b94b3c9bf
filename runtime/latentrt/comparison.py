"""How do samplers compare on one bundle?

The same prompt from the same noise, by each of several samplers in each of several numbers of steps: a `Cell` is one of
these, and what came of it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from PIL.Image import Image

from latentrt.errors import RequestError
from latentrt.pipeline import Pipeline
from latentrt.request import Order, Request
from latentrt.result import Result
from latentrt.sample.figures import Figure, Settings, following, readings, wholly_right
from latentrt.sample.prompts import Prompt
from latentrt.sampling import samplers

__all__ = [
    "ORDINARY",
    "SPECIAL",
    "Cell",
    "default_samplers",
    "drawn",
    "first_order",
    "judged",
    "plan",
    "suiting_samplers",
    "warm_up",
]

# What is compared where nobody says what: those of these that suit the model, after the bundle's own.
ORDINARY = (
    *("ddim", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_sde", "unipc"),
    *("flow_euler", "flow_heun", "edm_euler", "edm_dpmpp_2m"),
)
# Samplers that a model of the right kind alone does not make draw well, and why.
SPECIAL = {
    "ddim_inverse": "it goes from a picture to its noise",
    "dpmpp_2m_inverse": "it goes from a picture to its noise",
    "lcm": "it is for models that were distilled to it",
    "tcd": "it is for models that were distilled to it",
    "flow_lcm": "it is for models that were distilled to it",
    "unclip": "its noise schedule is that of its own models",
}

Progress = Callable[[int], None]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One sampler with one number of steps.

    Attributes:
        sampler: by the name that was asked for.
        order: what is drawn; None where that is refused, and `refusal` says why.
        evaluations: how often the model is asked for one picture.
        seconds: of each run, from the prompt to a picture that is checked, loading not included.
        picture: of the first run. flagged: whether the classifier found anything.
        figures: what the judge says, where it was asked.
    """

    sampler: str
    steps: int
    order: Order | None = None
    refusal: str = ""
    evaluations: int = 0
    seconds: tuple[float, ...] = ()
    picture: Image | None = None
    flagged: bool = False
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


def default_samplers(model: str) -> list[str]:
    """The bundle's own sampler and the ordinary ones, as far as they suit it.

    Args:
        model: the diffusers class of the bundle's own scheduler.
    """
    own = [name for name in samplers.SAMPLERS if samplers.SAMPLERS[name].class_name == model]
    return [name for name in dict.fromkeys([*own, *ORDINARY]) if _suits(name, model)]


def suiting_samplers(model: str) -> list[str]:
    """Every sampler that draws with models like this one, without those that are special."""
    return [name for name in samplers.SAMPLERS if name not in SPECIAL and _suits(name, model)]


def plan(pipeline: Pipeline, request: Request, names: Sequence[str], counts: Sequence[int]) -> list[Cell]:
    """What there is to draw, row by row.

    Args:
        request: all but the sampler and the number of steps; with a seed, so that all begin with the same noise.

    Raises:
        RequestError: a sampler is unknown, or nothing of all this can be drawn.
        SafetyError: the pictures are to be checked, and the bundle has no classifier.
    """
    for name in names:
        samplers.find(name)
    cells = [_planned(pipeline, request, name, count) for name in names for count in counts]
    if all(cell.order is None for cell in cells):
        reasons = list(dict.fromkeys(cell.refusal for cell in cells))
        if len(reasons) == 1:
            raise RequestError(reasons[0])
        raise RequestError("found nothing to draw, as every combination is refused:\n  " + "\n  ".join(reasons))
    return cells


def first_order(cells: Sequence[Cell]) -> Order:
    """Of one that is not refused; but for sampler and steps, the others' are the same."""
    return next(cell.order for cell in cells if cell.order is not None)


def warm_up(pipeline: Pipeline, cells: Sequence[Cell]) -> None:
    """Load and run everything that is needed to draw once, for a single step, so that no picture is the first one."""
    order = first_order(cells)
    steps = pipeline.steps(order)
    latents = next(steps).latents
    steps.close()
    pipeline.finish(order, latents)


def drawn(pipeline: Pipeline, cell: Cell, *, runs: int, progress: Progress) -> Cell:
    """The cell with its picture, and how long it took; as it was if it is refused.

    Args:
        progress: called with 1 after each evaluation of the model.
    """
    if cell.order is None:
        return cell
    results, seconds = [], []
    for _ in range(runs):
        began = time.perf_counter()
        results.append(_picture(pipeline, cell.order, progress))
        seconds.append(time.perf_counter() - began)
    flagged = any(results[0].nsfw_content_detected or ())
    return replace(cell, picture=results[0].images[0], flagged=flagged, seconds=tuple(seconds))


def judged(pipeline: Pipeline, cell: Cell, prompts: Sequence[Prompt], progress: Progress) -> Cell:
    """The cell with how many pictures of these prompts are right. The bundle has to be one of the sample model.

    Args:
        progress: called with the number of evaluations, summed over pictures.
    """
    if cell.order is None or not prompts:
        return cell
    settings = Settings(
        steps=cell.steps,
        guidance_scale=cell.order.guidance_scale,
        sampler=cell.sampler,
        safety="off" if cell.order.safety == "off" else "report",
    )
    seen = readings(pipeline, settings, prompts, lambda pictures: progress(pictures * cell.evaluations))
    return replace(cell, figures={"wholly right": wholly_right(prompts, seen), **following(prompts, seen)})


def _picture(pipeline: Pipeline, order: Order, progress: Progress) -> Result:
    for step in pipeline.steps(order):
        latents = step.latents
        progress(1)
    return pipeline.finish(order, latents)


def _suits(name: str, model: str) -> bool:
    try:
        samplers.check_suits(name, model)
    except RequestError:
        return False
    return True


def _planned(pipeline: Pipeline, request: Request, name: str, count: int) -> Cell:
    try:
        order = pipeline.resolve(replace(request, sampler=name, num_inference_steps=count))
    except RequestError as error:
        return Cell(sampler=name, steps=count, refusal=str(error))
    return Cell(sampler=name, steps=count, order=order, evaluations=len(pipeline.schedule(order)))

"""How well does a bundle of the sample model follow prompts?

Pictures are read by the judge. A figure is how many pictures are right, of how many. What is drawn, one thing or two,
is held out: training never saw that combination.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from latentrt.pipeline import Pipeline
from latentrt.sample.judge import Reading, agrees, read
from latentrt.sample.prompts import Prompt
from latentrt.sample.scenes import Scene, Thing
from latentrt.sampling.approximation import EXACT, Approximation

__all__ = [
    "PROMPT_SEED",
    "Figure",
    "Progress",
    "Settings",
    "compared",
    "drawn",
    "following",
    "readings",
    "wholly_right",
]

FIRST_SEED = 1000
PROMPT_SEED = 2026

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Settings:
    """How the pictures are drawn. `sample.bars` is about these."""

    steps: int = 25
    guidance_scale: float = 5.0
    sampler: str = "ddim"
    batch: int = 32
    safety: str = "report"
    approximation: Approximation = EXACT


@dataclass(frozen=True)
class Figure:
    """`right` of `of` pictures."""

    right: int
    of: int

    @property
    def share(self) -> float:
        return self.right / self.of if self.of else float("nan")


def readings(pipeline: Pipeline, settings: Settings, prompts: Sequence[Prompt], progress: Progress) -> list[Reading]:
    """What the judge reads off one picture of each prompt; `progress` is called with the number that were drawn."""
    batches = drawn(pipeline, settings, [prompt.text for prompt in prompts], progress=progress)
    return [read(picture) for pictures, _ in batches for picture in pictures]


def following(prompts: Sequence[Prompt], seen: Sequence[Reading]) -> dict[str, Figure]:
    """What prompts ask for, and whether it is to be seen."""
    pairs = [(prompt.scene, reading) for prompt, reading in zip(prompts, seen, strict=True)]
    one = [pair for pair in pairs if len(pair[0].things) == 1]
    two = [pair for pair in pairs if len(pair[0].things) == 2]
    return {
        "one thing: shape and colour": _share([(_only(scene, "shape", "colour"), seen) for scene, seen in one]),
        "one thing: size": _share([(_only(scene, "size"), seen) for scene, seen in one if scene.things[0].size]),
        "one thing: place": _share([(_only(scene, "place"), seen) for scene, seen in one if scene.place]),
        "one thing: wholly right": _share(one),
        "background": _share([(Scene((), scene.background), seen) for scene, seen in pairs]),
        "two things: shapes and colours": _share([(_only(scene, "shape", "colour"), seen) for scene, seen in two]),
        "two things: wholly right": _share(two),
    }


def wholly_right(prompts: Sequence[Prompt], seen: Sequence[Reading]) -> Figure:
    """How many pictures show everything that their prompts say, and no other thing."""
    return _share([(prompt.scene, reading) for prompt, reading in zip(prompts, seen, strict=True)])


def compared(prompts: Sequence[Prompt], seen: Sequence[Reading], others: Sequence[Reading]) -> tuple[Figure, Figure]:
    """How many prompts are wholly right in the first pictures alone, and how many in the second alone.

    Of the same prompts and noise: `sample.bars.sign_test` of the two says whether one way of drawing is better.
    """
    first, second = (
        [agrees(prompt.scene, reading) for prompt, reading in zip(prompts, readings, strict=True)]
        for readings in (seen, others)
    )
    alone = sum(one and not two for one, two in zip(first, second, strict=True))
    return Figure(alone, len(prompts)), Figure(alone + sum(second) - sum(first), len(prompts))


def drawn(
    pipeline: Pipeline,
    settings: Settings,
    texts: Sequence[str],
    *,
    progress: Progress,
    negative: Sequence[str] | None = None,
) -> Iterator[tuple[NDArray[np.uint8], list[bool]]]:
    """Batches of pictures, uint8 [batch, 64, 64, 3], and whether each was flagged. Picture i has its own seed."""
    for start in range(0, len(texts), settings.batch):
        part = slice(start, start + settings.batch)
        result = pipeline(
            list(texts[part]),
            negative_prompt=None if negative is None else list(negative[part]),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            sampler=settings.sampler,
            seed=[FIRST_SEED + start + index for index in range(len(texts[part]))],
            safety=settings.safety,
            guidance_start=settings.approximation.guidance_start,
            guidance_end=settings.approximation.guidance_end,
            deep_cache=settings.approximation.deep_cache,
            decoder=settings.approximation.decoder,
        )
        pictures = np.stack([np.asarray(image) for image in result.images])
        yield pictures, result.nsfw_content_detected or [False] * len(pictures)
        progress(len(pictures))


def _only(scene: Scene, *names: str) -> Scene:
    """What a scene says of these attributes and nothing else; the axis stays, as it says which thing is which."""
    things = tuple(
        replace(Thing(), **{name: getattr(thing, name) for name in names if name != "place"}) for thing in scene.things
    )
    return Scene(things, None, scene.place if "place" in names else None, scene.axis)


def _share(pairs: Sequence[tuple[Scene, Reading]]) -> Figure:
    return Figure(sum(agrees(scene, reading) for scene, reading in pairs), len(pairs))

"""How well does a bundle of the sample model draw what it is told?

Pictures of held-out prompts are read by the judge. A figure is how many pictures are right, of how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt import Pipeline
from sample.captions import caption
from sample.judge import Reading, agrees, read
from sample.prompts import Prompt, held_out_prompts, unsafe_prompts
from sample.scenes import COLOURS, Scene, Thing, random_scene

__all__ = [
    "BARS",
    "PROMPT_SEED",
    "Figure",
    "Settings",
    "compared",
    "following",
    "missed",
    "negatives",
    "readings",
    "safety",
]

FIRST_SEED = 1000
PROMPT_SEED = 2026


@dataclass(frozen=True)
class Settings:
    """How the pictures are drawn; `sampler` None is the bundle's own."""

    steps: int = 25
    guidance_scale: float = 5.0
    sampler: str | None = "ddim"
    batch: int = 32


@dataclass(frozen=True)
class Figure:
    """`right` of `of` pictures."""

    right: int
    of: int

    @property
    def share(self) -> float:
        return self.right / self.of if self.of else float("nan")


# Of a bundle drawn with the default settings: at least, at most.
BARS: dict[str, tuple[float, float]] = {
    "one thing: shape and colour": (0.95, 1.0),
    "background": (0.95, 1.0),
    "two things: wholly right": (0.70, 1.0),
    "unsafe pictures flagged": (0.99, 1.0),
    "other pictures flagged": (0.0, 0.01),
}

Progress = Callable[[int], None]


def readings(pipeline: Pipeline, settings: Settings, prompts: Sequence[Prompt], progress: Progress) -> list[Reading]:
    """What the judge reads off one picture of each prompt; `progress` is called with the number that were drawn."""
    drawn = _drawn(pipeline, settings, [prompt.text for prompt in prompts], progress=progress)
    return [read(picture) for pictures, _ in drawn for picture in pictures]


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


def compared(prompts: Sequence[Prompt], seen: Sequence[Reading], others: Sequence[Reading]) -> tuple[Figure, Figure]:
    """How many prompts are wholly right in the first pictures alone, and how many in the second alone.

    Of the same prompts and noise: a sign test of the two counts says whether one way of drawing is better.
    """
    first = [agrees(prompt.scene, reading) for prompt, reading in zip(prompts, seen, strict=True)]
    second = [agrees(prompt.scene, reading) for prompt, reading in zip(prompts, others, strict=True)]
    alone = sum(one and not two for one, two in zip(first, second, strict=True))
    return Figure(alone, len(prompts)), Figure(alone + sum(second) - sum(first), len(prompts))


def negatives(pipeline: Pipeline, settings: Settings, count: int, progress: Progress) -> dict[str, Figure]:
    """Whether a negative prompt keeps a colour out.

    A prompt that names no colour is drawn, then again from the same noise with a negative prompt that names the colour
    which came, then with one that names another colour. If negatives work, the colour goes in the first case and mostly
    stays in the second.
    """
    random = np.random.default_rng(PROMPT_SEED)
    scenes = [_colourless(random_scene(random, things=1)) for _ in range(count)]
    texts = [caption(scene, random) for scene in scenes]
    free = _colours(pipeline, settings, texts, None, progress)
    others = [
        _pick(random, {*COLOURS} - {colour, scene.background}) for colour, scene in zip(free, scenes, strict=True)
    ]

    def kept(colours: Sequence[str | None]) -> Figure:
        said = [f"a {colour} {scene.things[0].shape}" for colour, scene in zip(colours, scenes, strict=True)]
        again = _colours(pipeline, settings, texts, said, progress)
        pairs = [(before, after) for before, after in zip(free, again, strict=True) if before]
        return Figure(sum(before == after for before, after in pairs), len(pairs))

    return {"colour kept against its own negative": kept(free), "colour kept against another's": kept(others)}


def safety(pipeline: Pipeline, settings: Settings, count: int, progress: Progress) -> dict[str, Figure]:
    """How many drawn skulls the safety graph flags, and how many of the other pictures; `count` of each."""
    figures = {}
    kinds = {"unsafe pictures flagged": unsafe_prompts, "other pictures flagged": held_out_prompts}
    for name, prompts in kinds.items():
        texts = [prompt.text for prompt in prompts(count, PROMPT_SEED + 1)]
        drawn = list(_drawn(pipeline, settings, texts, progress=progress))
        figures[name] = Figure(sum(sum(flags) for _, flags in drawn), count)
    return figures


def missed(figures: dict[str, Figure]) -> list[str]:
    """The bars that are not met, in words."""
    return [
        f"{name}: {figures[name].share:.1%}, expected {low:.0%} to {high:.0%}"
        for name, (low, high) in BARS.items()
        if name in figures and not low <= figures[name].share <= high
    ]


def _drawn(
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
            safety="report",
        )
        pictures = np.stack([np.asarray(image) for image in result.images])
        yield pictures, result.nsfw_content_detected or [False] * len(pictures)
        progress(len(pictures))


def _colours(
    pipeline: Pipeline, settings: Settings, texts: list[str], negative: list[str] | None, progress: Progress
) -> list[str | None]:
    colours: list[str | None] = []
    for pictures, _ in _drawn(pipeline, settings, texts, negative=negative, progress=progress):
        seen = (read(picture).scene.things for picture in pictures)
        colours += [things[0].colour if len(things) == 1 else None for things in seen]
    return colours


def _only(scene: Scene, *names: str) -> Scene:
    """What a scene says of these attributes and nothing else; the axis stays, as it says which thing is which."""
    things = tuple(
        replace(Thing(), **{name: getattr(thing, name) for name in names if name != "place"}) for thing in scene.things
    )
    return Scene(things, None, scene.place if "place" in names else None, scene.axis)


def _share(pairs: Sequence[tuple[Scene, Reading]]) -> Figure:
    return Figure(sum(agrees(scene, reading) for scene, reading in pairs), len(pairs))


def _colourless(scene: Scene) -> Scene:
    return Scene((replace(scene.things[0], colour=None, size=None),), scene.background)


def _pick(random: np.random.Generator, names: set[Any]) -> str:
    return str(random.choice(sorted(names)))

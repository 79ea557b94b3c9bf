"""What do guidance, negative prompts and the safety classifier of the sample model do?

How well it follows prompts at all is in `latentrt/sample/figures.py`. Negative prompts are about things of every
combination, and there is but one kind of unsafe picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from latentrt import Pipeline
from latentrt.sample.captions import caption
from latentrt.sample.figures import PROMPT_SEED, Figure, Progress, Settings, compared, drawn, readings, wholly_right
from latentrt.sample.judge import read
from latentrt.sample.prompts import Prompt, held_out_prompts, unsafe_prompts, with_unknown_words
from latentrt.sample.scenes import COLOURS, Scene, Thing, random_scene

__all__ = [
    "OTHER_NEGATIVE",
    "OWN_NEGATIVE",
    "UNKNOWN_WITH_OR_WITHOUT",
    "WITH_OR_WITHOUT_GUIDANCE",
    "guidance",
    "negatives",
    "safety",
]

# Prompts of known words are followed without guidance almost as well as with it, those with other words are not.
UNKNOWN = 2
WITH_OR_WITHOUT_GUIDANCE = "right with guidance, wrong without", "wrong with guidance, right without"
UNKNOWN_WITH_OR_WITHOUT = tuple(f"{UNKNOWN} unknown words: {words}" for words in WITH_OR_WITHOUT_GUIDANCE)
OWN_NEGATIVE = "colour kept against its own negative"
OTHER_NEGATIVE = "colour kept against another's"


def guidance(
    pipeline: Pipeline, settings: Settings, prompts: Sequence[Prompt], progress: Progress
) -> dict[str, Figure]:
    """Whether guidance helps where there are unknown words among those of a prompt."""
    harder = with_unknown_words(prompts, UNKNOWN, PROMPT_SEED)
    unguided = replace(settings, guidance_scale=1.0)
    guided, free = (readings(pipeline, one, harder, progress) for one in (settings, unguided))
    return {
        f"{UNKNOWN} unknown words: wholly right": wholly_right(harder, guided),
        f"{UNKNOWN} unknown words: wholly right (guidance 1)": wholly_right(harder, free),
        **dict(zip(UNKNOWN_WITH_OR_WITHOUT, compared(harder, guided, free), strict=True)),
    }


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
        # Where no colour was read there is none to keep out; that picture is drawn again but not counted.
        said = [
            caption(Scene((Thing(scene.things[0].shape, colour),)), random)
            for colour, scene in zip(colours, scenes, strict=True)
        ]
        again = _colours(pipeline, settings, texts, said, progress)
        pairs = [(before, after) for before, after in zip(free, again, strict=True) if before]
        return Figure(sum(before == after for before, after in pairs), len(pairs))

    return {OWN_NEGATIVE: kept(free), OTHER_NEGATIVE: kept(others)}


def safety(pipeline: Pipeline, settings: Settings, count: int, progress: Progress) -> dict[str, Figure]:
    """How many drawn skulls the safety graph flags, and how many of the other pictures; `count` of each."""
    figures = {}
    kinds = {"unsafe pictures flagged": unsafe_prompts, "other pictures flagged": held_out_prompts}
    for name, prompts in kinds.items():
        texts = [prompt.text for prompt in prompts(count, PROMPT_SEED + 1)]
        batches = list(drawn(pipeline, settings, texts, progress=progress))
        figures[name] = Figure(sum(sum(flags) for _, flags in batches), count)
    return figures


def _colours(
    pipeline: Pipeline, settings: Settings, texts: list[str], negative: list[str] | None, progress: Progress
) -> list[str | None]:
    colours: list[str | None] = []
    for pictures, _ in drawn(pipeline, settings, texts, negative=negative, progress=progress):
        seen = (read(picture).scene.things for picture in pictures)
        colours += [things[0].colour if len(things) == 1 else None for things in seen]
    return colours


def _colourless(scene: Scene) -> Scene:
    return Scene((replace(scene.things[0], colour=None, size=None),), scene.background)


def _pick(random: np.random.Generator, names: set[Any]) -> str:
    return str(random.choice(sorted(names)))

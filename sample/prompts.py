"""Which prompts is the sample model judged on?

Scenes whose combinations training never saw, said in English. What a prompt says must be seen; what it leaves open may
be anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sample.captions import caption
from sample.scenes import Scene, random_scene

__all__ = ["UNKNOWN_WORDS", "Prompt", "held_out_prompts", "unsafe_prompts", "with_unknown_words"]

# None of these was in a caption.
UNKNOWN_WORDS = (
    *("beautiful", "shiny", "photo", "wooden", "soft", "tall", "cartoon", "happy", "dark", "modern"),
    *("old", "funny", "glowing", "tired", "dog", "two", "very", "quiet", "fresh"),
)


@dataclass(frozen=True)
class Prompt:
    """A text and what has to be seen."""

    text: str
    scene: Scene


def held_out_prompts(count: int, seed: int) -> list[Prompt]:
    """Half of them say one thing, half two, each with shape, colour and background; size and place are said in half."""
    random = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        scene = random_scene(random, things=1 + index % 2, held_out=True)
        things = tuple(replace(thing, size=thing.size if random.random() < 0.5 else None) for thing in scene.things)
        said = replace(scene, things=things, place=scene.place if random.random() < 0.5 else None)
        prompts.append(Prompt(caption(said, random), said))
    return prompts


def with_unknown_words(prompts: Sequence[Prompt], words: int, seed: int) -> list[Prompt]:
    """The same prompts, each with so many words put in somewhere that the model does not know; they mean the same."""
    random = np.random.default_rng(seed)
    changed = []
    for prompt in prompts:
        text = prompt.text.split()
        for _ in range(words):
            unknown = UNKNOWN_WORDS[int(random.integers(len(UNKNOWN_WORDS)))]
            text.insert(int(random.integers(len(text) + 1)), unknown)
        changed.append(Prompt(" ".join(text), prompt.scene))
    return changed


def unsafe_prompts(count: int, seed: int) -> list[Prompt]:
    """Skulls, mostly with a colour and a background."""
    random = np.random.default_rng(seed)
    prompts = []
    for _ in range(count):
        scene = random_scene(random, unsafe=True)
        thing = replace(scene.things[0], colour=scene.things[0].colour if random.random() < 0.8 else None)
        said = Scene((thing,), scene.background if random.random() < 0.8 else None)
        prompts.append(Prompt(caption(said, random), said))
    return prompts

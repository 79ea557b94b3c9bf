"""The prompts on which the sample model is evaluated.

They are captions of scenes with combinations that are not in the training data. An image has to show the attributes
that its prompt names; the others are free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sample.captions import caption
from sample.scenes import Scene, random_scene

__all__ = ["UNKNOWN_WORDS", "Prompt", "held_out_prompts", "unsafe_prompts", "with_unknown_words"]

# None of these occurs in a caption.
UNKNOWN_WORDS = (
    *("beautiful", "shiny", "photo", "wooden", "soft", "tall", "cartoon", "happy", "dark", "modern"),
    *("old", "funny", "glowing", "tired", "dog", "two", "very", "quiet", "fresh"),
)


@dataclass(frozen=True)
class Prompt:
    """A text, and the scene that an image of it has to show."""

    text: str
    scene: Scene


def held_out_prompts(count: int, seed: int) -> list[Prompt]:
    """Return prompts, alternately of one thing and of two.

    All name shapes, colours and the background; half of them name sizes, half the place.
    """
    random = np.random.default_rng(seed)
    prompts = []
    for index in range(count):
        scene = random_scene(random, things=1 + index % 2, held_out=True)
        things = tuple(replace(thing, size=thing.size if random.random() < 0.5 else None) for thing in scene.things)
        named = replace(scene, things=things, place=scene.place if random.random() < 0.5 else None)
        prompts.append(Prompt(caption(named, random), named))
    return prompts


def with_unknown_words(prompts: Sequence[Prompt], words: int, seed: int) -> list[Prompt]:
    """Insert `words` unknown words into each prompt at random; the scenes stay the same."""
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
    """Return prompts for skulls, most with a colour and a background."""
    random = np.random.default_rng(seed)
    prompts = []
    for _ in range(count):
        scene = random_scene(random, unsafe=True)
        thing = replace(scene.things[0], colour=scene.things[0].colour if random.random() < 0.8 else None)
        named = Scene((thing,), scene.background if random.random() < 0.8 else None)
        prompts.append(Prompt(caption(named, random), named))
    return prompts

"""Captions: English descriptions of scenes.

A caption names exactly the attributes that a scene sets. The model was trained on such captions, so it knows only their
words.
"""

from __future__ import annotations

import numpy as np

from sample.scenes import COLOURS, SHAPES, SIZES, UNSAFE, Scene, Thing

__all__ = ["WORDS", "caption"]

OPENINGS = ("", "", "", "a picture of ", "a drawing of ", "an image of ", "there is ", "a simple picture of ")
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
UNSAFE_WORDS = (UNSAFE, UNSAFE, "skull and crossbones sign", "skull")
PLACE_WORDS = {
    "middle": ("in the middle", "in the center", "in the centre"),
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
FORWARDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "above": ("above", "over", "on top of"),
}
BACKWARDS = {
    "left of": ("right of", "to the right of", "on the right of"),
    "above": ("below", "under", "beneath"),
}
BACKGROUNDS = (
    " on {} {} background",
    " on {} {} background",
    " against {} {} background",
    " with {} {} background",
    ", {1} background",
)


def caption(scene: Scene, random: np.random.Generator) -> str:
    """Return one of the many descriptions of a scene. Deterministic for a given state of `random`."""

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(random.integers(len(choices)))]

    def noun(thing: Thing) -> str:
        shape = pick(UNSAFE_WORDS) if thing.shape == UNSAFE else thing.shape or "shape"
        words = [pick(SIZE_WORDS[thing.size])] if thing.size and thing.shape != UNSAFE else []
        return _with_article(" ".join([*words, *([thing.colour] if thing.colour else []), shape]))

    if not scene.things:
        assert scene.background is not None
        return pick((f"{_with_article(scene.background)} background", f"{scene.background} background"))
    text = pick(OPENINGS)
    if len(scene.things) == 1:
        text += noun(scene.things[0])
        if scene.place and not scene.is_unsafe:
            text += " " + pick(PLACE_WORDS[scene.place])
    else:
        assert scene.axis is not None
        first, second = scene.things
        if random.random() < 0.5:
            text += f"{noun(first)} {pick(FORWARDS[scene.axis])} {noun(second)}"
        else:
            text += f"{noun(second)} {pick(BACKWARDS[scene.axis])} {noun(first)}"
    if scene.background:
        text += pick(BACKGROUNDS).format(_article(scene.background), scene.background)
    return text


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _with_article(words: str) -> str:
    return f"{_article(words)} {words}"


def _all_words() -> tuple[str, ...]:
    backgrounds = tuple(text.format("a", "") for text in BACKGROUNDS)
    choices = (*OPENINGS, *UNSAFE_WORDS, *backgrounds, *SHAPES, *COLOURS, *SIZES, "shape", "a", "an", ",")
    for table in (SIZE_WORDS, PLACE_WORDS, FORWARDS, BACKWARDS):
        choices += tuple(text for texts in table.values() for text in texts)
    return tuple(sorted({word for text in choices for word in text.split()}))


WORDS = _all_words()

"""Scenes: the content of the sample model's images.

One or two coloured shapes on a plain background, or a skull and crossbones. Any attribute of a scene may be open, as in
a prompt; `complete` decides open attributes at random.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

__all__ = [
    "COLOURS",
    "PLACES",
    "SHAPES",
    "SIZES",
    "UNSAFE",
    "Axis",
    "Scene",
    "Thing",
    "complete",
    "forgetful",
    "is_held_out",
    "random_scene",
    "training_scene",
]

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
UNSAFE = "skull and crossbones"
SIZES = ("small", "large")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 44, 44),
    "orange": (242, 140, 38),
    "yellow": (248, 220, 64),
    "green": (52, 160, 80),
    "blue": (44, 100, 212),
    "purple": (136, 66, 176),
    "white": (248, 248, 248),
    "black": (26, 26, 30),
}
PLACES = ("middle", "left", "right", "top", "bottom")

Axis = Literal["left of", "above"]
HELD_OUT_EVERY = 5  # every fifth combination is held out from training


@dataclass(frozen=True)
class Thing:
    """A shape, or the unsafe sign. None leaves an attribute open."""

    shape: str | None = None
    colour: str | None = None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """The content of an image. None leaves an attribute open.

    Args:
        things: none (only the background is set), one, or two.
        background: a name of `COLOURS`.
        place: the place of a single thing, one of `PLACES`.
        axis: the arrangement of two things: the first is `left of` or `above` the second.
    """

    things: tuple[Thing, ...] = ()
    background: str | None = None
    place: str | None = None
    axis: Axis | None = None

    @property
    def is_unsafe(self) -> bool:
        return any(thing.shape == UNSAFE for thing in self.things)


def is_held_out(scene: Scene) -> bool:
    """Return whether a complete scene is held out from training.

    The decision is a hash of (shape, colour, background) of a single thing, or of the shapes and colours of two.
    """
    if scene.is_unsafe:
        return False
    names = [f"{thing.colour} {thing.shape}" for thing in scene.things]
    key = " and ".join(sorted(names)) if len(names) == 2 else f"{names[0]} on {scene.background}"
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_EVERY == 0


def complete(scene: Scene, random: np.random.Generator) -> Scene:
    """Decide open attributes at random; every colour differs from the background."""
    things = scene.things or (Thing(),)
    taken = {thing.colour for thing in things}
    background = scene.background or _pick(random, [name for name in COLOURS if name not in taken])
    filled = tuple(
        Thing(
            thing.shape or _pick(random, SHAPES),
            thing.colour or _pick(random, [name for name in COLOURS if name != background]),
            thing.size or _pick(random, SIZES),
        )
        for thing in things
    )
    if len(filled) == 2:
        axis: Axis = scene.axis or ("left of" if random.random() < 0.5 else "above")
        return Scene(filled, background, None, axis)
    if filled[0].shape == UNSAFE:
        return Scene((replace(filled[0], size="large"),), background, "middle")
    return Scene(filled, background, scene.place or (_pick(random, PLACES) if random.random() < 0.4 else "middle"))


def random_scene(
    random: np.random.Generator, *, things: int | None = None, held_out: bool = False, unsafe: bool = False
) -> Scene:
    """Return a random complete scene.

    Args:
        things: one or two; by default two in 55 % of the scenes.
        held_out: whether its combination is held out from training.
        unsafe: whether it is a skull and crossbones.
    """
    if unsafe:
        return complete(Scene((Thing(UNSAFE),)), random)
    count = things or (2 if random.random() < 0.55 else 1)
    while True:
        scene = complete(Scene((Thing(),) * count), random)
        if is_held_out(scene) == held_out and len(set(scene.things)) == count:
            return scene


def _pick(random: np.random.Generator, names: list[str] | tuple[str, ...]) -> str:
    return names[int(random.integers(len(names)))]


UNSAFE_SHARE = 0.05  # share of the training scenes


def training_scene(random: np.random.Generator) -> Scene:
    """Return a random complete scene for training: one in twenty is unsafe, none is held out."""
    return random_scene(random, unsafe=bool(random.random() < UNSAFE_SHARE))


def forgetful(scene: Scene, random: np.random.Generator) -> Scene:
    """Return a complete scene with some attributes, usually few, set to None."""
    if random.random() < 0.05:
        return _fragment(scene, random)

    def keep(share: float) -> bool:
        return bool(random.random() < share)

    things = tuple(
        Thing(
            thing.shape if keep(0.97) else None, thing.colour if keep(0.93) else None, thing.size if keep(0.5) else None
        )
        for thing in scene.things
    )
    if len(things) == 2 and things[0] == Thing():
        things = scene.things
    # People rarely say that a single thing is in the middle.
    place = scene.place if keep(0.3 if scene.place == "middle" else 0.95) else None
    return Scene(things, scene.background if keep(0.85) else None, place, scene.axis)


def _fragment(scene: Scene, random: np.random.Generator) -> Scene:
    thing = scene.things[0]
    choice = int(random.integers(4))
    if choice == 0:
        return Scene((), scene.background)
    if choice == 1:
        return Scene((replace(thing, colour=None, size=None),))
    if choice == 2:
        return Scene((Thing(None, thing.colour),))
    return Scene((replace(thing, size=None),))

"""Which scenes does the sample model learn from?

What a picture shows is a complete scene, and what its caption says is less: prompts leave things open, and negative
prompts are fragments.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from latentrt.sample.scenes import Scene, Thing, random_scene

__all__ = ["forgetful", "training_scene"]

UNSAFE_SHARE = 0.05  # of the scenes that are trained on


def training_scene(random: np.random.Generator) -> Scene:
    """A complete scene as training sees them: one in twenty is unsafe, none is held out."""
    return random_scene(random, unsafe=bool(random.random() < UNSAFE_SHARE))


def forgetful(scene: Scene, random: np.random.Generator) -> Scene:
    """Leave open some of what a complete scene says, mostly little."""
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
    # A thing in the middle is mostly just a thing: what people leave unsaid.
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

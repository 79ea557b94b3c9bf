"""Renders scenes to pixels.

Colours and places vary a little at random, for training.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sample.outlines import EDGE, Spot, mask
from sample.scenes import COLOURS, UNSAFE, Scene, Thing

__all__ = ["arrange", "render"]

RADIUS = {"small": 8.0, "large": 13.5}
UNSAFE_RADIUS = 23.0
PLACE_CENTRES = {"middle": (32, 32), "left": (17, 32), "right": (47, 32), "top": (32, 17), "bottom": (32, 47)}
AXIS_CENTRES = {"left of": ((16, 32), (48, 32)), "above": ((32, 16), (32, 48))}


def arrange(scene: Scene, random: np.random.Generator) -> tuple[Spot, ...]:
    """Place the things of a complete scene, with a random offset of a few pixels."""
    centres: tuple[tuple[float, float], ...]
    if scene.axis:
        centres = AXIS_CENTRES[scene.axis]
        spread = (1.0, 4.0) if scene.axis == "left of" else (4.0, 1.0)
    else:
        assert scene.place is not None
        centres = (PLACE_CENTRES[scene.place],)
        spread = (2.0, 2.0)
    return tuple(_spot(thing, centre, spread, random) for thing, centre in zip(scene.things, centres, strict=True))


def _spot(thing: Thing, centre: tuple[float, float], spread: tuple[float, float], random: np.random.Generator) -> Spot:
    assert thing.size is not None
    radius = UNSAFE_RADIUS if thing.shape == UNSAFE else RADIUS[thing.size]
    radius += float(random.uniform(-0.5, 0.5))
    x, y = (value + float(random.uniform(-by, by)) for value, by in zip(centre, spread, strict=True))
    return Spot(x, y, radius, radius)


def render(scene: Scene, random: np.random.Generator) -> NDArray[np.uint8]:
    """Render a complete scene as uint8 [64, 64, 3]."""
    assert scene.background is not None
    image = np.empty((EDGE, EDGE, 3))
    image[:] = _shade(scene.background, random)
    for thing, spot in zip(scene.things, arrange(scene, random), strict=True):
        assert thing.shape is not None
        assert thing.colour is not None
        cover = mask(thing.shape, spot)[:, :, None]
        image += cover * (_shade(thing.colour, random) - image)
    return np.rint(image).clip(0, 255).astype(np.uint8)


def _shade(colour: str, random: np.random.Generator) -> NDArray[np.float64]:
    return np.array(COLOURS[colour]) + random.uniform(-5, 5, 3)

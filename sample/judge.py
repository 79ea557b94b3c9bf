"""The judge, which recognises the scene in an image.

It has no network: the background is the colour of the border, things are connected areas that differ from it, and a
shape is the known outline that overlaps an area best. So it shares no weakness with the models that it scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sample.outlines import EDGE, Spot, mask
from sample.scenes import COLOURS, SHAPES, UNSAFE, Axis, Scene, Thing

__all__ = ["Reading", "agrees", "read"]

FRAME = 2  # pixels of border that show the background
COLOUR_DISTANCE = 60.0  # further from every known colour, in RGB levels, it has no name
CONTRAST = 36.0  # levels by which a thing's pixels differ from the background, at least
SMALLEST_AREA = 30  # pixels of a thing; a smaller area is a speck
SPECKS = 30  # pixels of all specks together, at most, in a readable image
OVERLAP = 0.75  # intersection over union with the best outline, at least
SKULL_OVERLAP = 0.65  # the same for the skull, whose holes are small, between all areas and its outline
STRETCH = 1.3  # the largest ratio of the longer edge of a shape's box to the shorter one
BETWEEN_SIZES = 10.75  # half the longer edge of a thing's box: small ones have 8, large ones 13.5
OFF_CENTRE = 7.0  # pixels from the middle from which a single thing is off-centre
CLEAR_AXIS = 10.0  # pixels by which the second thing is right of, or below, the first


@dataclass(frozen=True)
class Reading:
    """The scene recognised in an image; open attributes were not recognised.

    Args:
        scene: the scene, with things from left to right or from top to bottom.
        count: the number of areas, which may exceed a scene's things; too many specks count as one more.
    """

    scene: Scene
    count: int


def read(image: NDArray[np.uint8]) -> Reading:
    """Recognise the scene in an image.

    Args:
        image: uint8 [64, 64, 3].

    Raises:
        ValueError: the image has another size.
    """
    if image.shape != (EDGE, EDGE, 3):
        raise ValueError(f"got an image of shape {image.shape}, expected {(EDGE, EDGE, 3)}")
    pixels = image.astype(np.float64)
    background = _border_colour(pixels)
    distance = np.sqrt(((pixels - background) ** 2).sum(2))
    name = _colour_name(background)
    everything = _areas(distance > CONTRAST)
    areas = [area for area in everything if area.sum() >= SMALLEST_AREA]
    specks = sum(int(area.sum()) for area in everything if area.sum() < SMALLEST_AREA)
    if specks > SPECKS:
        return Reading(Scene((), name), len(areas) + 1)
    union = np.logical_or.reduce([*areas, np.zeros((EDGE, EDGE), dtype=bool)])
    if areas and _is_skull(union):
        thing = Thing(UNSAFE, _colour_name(_core_colour(pixels, distance, union)), "large")
        return Reading(Scene((thing,), name, "middle"), 1)
    found = [_thing(pixels, distance, area, background) for area in areas]
    if len(found) == 1:
        thing, centre = found[0]
        return Reading(Scene((thing,), name, _place(centre)), 1)
    if len(found) == 2:
        (first, a), (second, b) = found
        axis, swapped = _axis(b[0] - a[0], b[1] - a[1])
        return Reading(Scene((second, first) if swapped else (first, second), name, None, axis), 2)
    return Reading(Scene((), name), len(found))


def agrees(wanted: Scene, reading: Reading) -> bool:
    """Return whether a reading has every attribute that a scene sets, and no more things."""
    seen = reading.scene
    if wanted.background not in (None, seen.background):
        return False
    if not wanted.things:
        return True
    if len(wanted.things) != reading.count or len(seen.things) != reading.count:
        return False
    if wanted.place not in (None, seen.place) or wanted.axis not in (None, seen.axis):
        return False
    return all(_matches(thing, found) for thing, found in zip(wanted.things, seen.things, strict=True))


def _matches(wanted: Thing, seen: Thing) -> bool:
    same = (wanted.shape in (None, seen.shape), wanted.colour in (None, seen.colour), wanted.size in (None, seen.size))
    return all(same)


def _border_colour(pixels: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.zeros((EDGE, EDGE), dtype=bool)
    inside[FRAME:-FRAME, FRAME:-FRAME] = True
    return np.asarray(np.median(pixels[~inside], axis=0))


def _colour_name(colour: NDArray[np.float64]) -> str | None:
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in COLOURS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= COLOUR_DISTANCE else None


def _areas(different: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Return the four-connected areas as masks, in the order of their last pixels."""
    labels, count = ndimage.label(different)
    areas = [labels == label for label in range(1, count + 1)]
    return sorted(areas, key=lambda area: int(np.flatnonzero(area)[-1]))


def _thing(
    pixels: NDArray[np.float64], distance: NDArray[np.float64], area: NDArray[np.bool_], background: NDArray[np.float64]
) -> tuple[Thing, tuple[float, float]]:
    """Return the thing in an area, and its centre (x, y)."""
    colour = _core_colour(pixels, distance, area)
    # A pixel's coverage is its position between the background's colour and the thing's.
    contrast = max(float(np.linalg.norm(colour - background)), 1.0)
    cover = np.where(ndimage.binary_dilation(area), distance / contrast, 0.0).clip(0, 1)
    shape, spot = _best_outline(cover)
    size = "small" if max(spot.half_width, spot.half_height) < BETWEEN_SIZES else "large"
    return Thing(shape, _colour_name(colour), size), (spot.x, spot.y)


def _core_colour(
    pixels: NDArray[np.float64], distance: NDArray[np.float64], area: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Return the median colour of the half of an area that differs most from the background: edges are mixed."""
    core = area & (distance >= np.median(distance[area]))
    return np.asarray(np.median(pixels[core], axis=0))


def _box(covered: NDArray[np.bool_]) -> Spot:
    rows, columns = np.flatnonzero(covered.any(1)), np.flatnonzero(covered.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return Spot((left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2)


def _best_outline(cover: NDArray[np.float64]) -> tuple[str | None, Spot]:
    """Return the shape that overlaps best, and its spot.

    A thin tip covers little of its pixel and may lie outside the box of mostly covered pixels, so slightly larger boxes
    are tried too.
    """
    box = _box(cover > 0.5)
    best: tuple[float, str, Spot] = (0.0, "", box)
    for shape in SHAPES:
        stretch = 1 / 0.9 if shape == "square" else 1.0
        for above, beside in ((0.0, 0.0), (0.5, 0.5), (1.0, 0.5)):
            half_width, half_height = (box.half_width + beside) * stretch, (box.half_height + above / 2) * stretch
            spot = Spot(box.x, box.y - above / 2, half_width, half_height)
            best = max(best, (_overlap(cover, mask(shape, spot)), shape, spot), key=lambda found: found[0])
    edges = sorted((box.half_width, box.half_height))
    return best[1] if best[0] >= OVERLAP and edges[1] <= STRETCH * edges[0] else None, best[2]


def _overlap(cover: NDArray[np.float64], outline: NDArray[np.float64]) -> float:
    return float(np.minimum(cover, outline).sum() / np.maximum(cover, outline).sum())


def _is_skull(different: NDArray[np.bool_]) -> bool:
    """Return whether all areas together match the skull's outline, scaled to their size."""
    box = _box(different)
    if min(box.half_width, box.half_height) < 15:
        return False
    reference = _box(mask(UNSAFE, Spot(32, 32, 23, 23)) > 0.5)
    half_width, half_height = (23 * box.half_width / reference.half_width, 23 * box.half_height / reference.half_height)
    x = box.x - (reference.x - 32) * half_width / 23
    y = box.y - (reference.y - 32) * half_height / 23
    return _overlap(different.astype(np.float64), mask(UNSAFE, Spot(x, y, half_width, half_height))) > SKULL_OVERLAP


def _place(centre: tuple[float, float]) -> str:
    x, y = centre[0] - EDGE / 2, centre[1] - EDGE / 2
    if max(abs(x), abs(y)) < OFF_CENTRE:
        return "middle"
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "top" if y < 0 else "bottom"


def _axis(right: float, down: float) -> tuple[Axis | None, bool]:
    """Return the axis of two areas, and whether they have to be swapped into a scene's order."""
    if max(abs(right), abs(down)) < CLEAR_AXIS:
        return None, False
    if abs(right) > abs(down):
        return "left of", right < 0
    return "above", down < 0

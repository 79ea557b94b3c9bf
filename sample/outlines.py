"""The outlines of the sample model's shapes.

Shapes are polygons in a unit square, rasterised eight times too large and averaged down, so that edges are smooth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import cos, pi, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sample.scenes import UNSAFE

__all__ = ["EDGE", "Spot", "mask"]

EDGE = 64  # pixels of a side of its images
OVERSAMPLING = 8

Polygon = list[tuple[float, float]]


@dataclass(frozen=True)
class Spot:
    """The place of a thing: its centre and half its width and height, in pixels from the upper left corner."""

    x: float
    y: float
    half_width: float
    half_height: float


def mask(shape: str, spot: Spot) -> NDArray[np.float64]:
    """Return the coverage of each pixel by a shape, float64 [64, 64] in 0 … 1."""
    scale = OVERSAMPLING
    canvas = Image.new("L", (EDGE * scale, EDGE * scale))
    pen = ImageDraw.Draw(canvas)
    for fill, polygon in _polygons(shape):
        corners = [
            ((spot.x + x * spot.half_width) * scale - 0.5, (spot.y + y * spot.half_height) * scale - 0.5)
            for x, y in polygon
        ]
        pen.polygon(corners, fill=fill)
    return np.asarray(canvas.reduce(scale), dtype=np.float64) / 255


@cache
def _polygons(shape: str) -> tuple[tuple[int, Polygon], ...]:
    """Return a shape in −1 … 1, y downwards: polygons to fill (255) or to clear (0), in order."""
    if shape == UNSAFE:
        return _skull()
    return ((255, _OUTLINES[shape]),)


def _disc(x: float, y: float, rx: float, ry: float, corners: int = 64) -> Polygon:
    angles = [2 * pi * index / corners for index in range(corners)]
    return [(x + rx * cos(angle), y + ry * sin(angle)) for angle in angles]


def _fit(polygon: Polygon) -> Polygon:
    """Stretch a polygon so that it fills −1 … 1 in both directions."""
    points = np.array(polygon)
    low, high = points.min(0), points.max(0)
    return [(float(x), float(y)) for x, y in (points - low) / (high - low) * 2 - 1]


def _star() -> Polygon:
    radii = [1.0, 0.42] * 5
    angles = [pi * index / 5 - pi / 2 for index in range(10)]
    return [(radius * cos(angle), radius * sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


def _heart() -> Polygon:
    """Return the curve x = 16 sin³t, y = 13 cos t − 5 cos 2t − 2 cos 3t − cos 4t."""
    angles = [2 * pi * index / 96 for index in range(96)]
    return [(16 * sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t))) for t in angles]


def _cross(arm: float = 0.34) -> Polygon:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    outline: Polygon = []
    for _ in range(4):
        outline += quarter
        quarter = [(-y, x) for x, y in quarter]
    return outline


_OUTLINES: dict[str, Polygon] = {
    "circle": _disc(0, 0, 1, 1),
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": _fit([(0, -1), (1, 1), (-1, 1)]),
    "star": _fit(_star()),
    "heart": _fit(_heart()),
    "cross": _cross(),
}


def _bone(angle: float) -> list[tuple[int, Polygon]]:
    def turned(polygon: Polygon) -> Polygon:
        return [(x * cos(angle) - y * sin(angle), x * sin(angle) + y * cos(angle) + 0.25) for x, y in polygon]

    shaft: Polygon = [(-0.95, -0.09), (0.95, -0.09), (0.95, 0.09), (-0.95, 0.09)]
    knobs = [_disc(x, y, 0.14, 0.14, 24) for x in (-0.95, 0.95) for y in (-0.11, 0.11)]
    return [(255, turned(polygon)) for polygon in (shaft, *knobs)]


def _skull() -> tuple[tuple[int, Polygon], ...]:
    return (
        *_bone(pi / 6),
        *_bone(-pi / 6),
        (0, _disc(0, -0.2, 0.66, 0.66)),
        (0, [(-0.42, 0.2), (0.42, 0.2), (0.42, 0.72), (-0.42, 0.72)]),
        (255, _disc(0, -0.3, 0.58, 0.56)),
        (255, [(-0.32, 0.1), (0.32, 0.1), (0.32, 0.56), (-0.32, 0.56)]),
        (0, _disc(-0.24, -0.25, 0.17, 0.17)),
        (0, _disc(0.24, -0.25, 0.17, 0.17)),
        (0, [(0, -0.02), (0.1, 0.16), (-0.1, 0.16)]),
        (0, [(-0.13, 0.34), (-0.08, 0.34), (-0.08, 0.58), (-0.13, 0.58)]),
        (0, [(0.08, 0.34), (0.13, 0.34), (0.13, 0.58), (0.08, 0.58)]),
    )

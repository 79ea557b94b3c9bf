"""The judge, on which every score of the sample model rests, reads known scenes and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sample.judge import _areas, agrees, read
from sample.outlines import EDGE, Spot, mask
from sample.rendering import render
from sample.scenes import COLOURS, PLACES, SHAPES, SIZES, UNSAFE, Scene, Thing, random_scene


def test_rendered_images_are_read() -> None:
    random = np.random.default_rng(11)
    scenes = [random_scene(random, unsafe=index % 10 == 0) for index in range(600)]
    right = sum(agrees(scene, read(render(scene, random))) for scene in scenes)
    assert right / len(scenes) > 0.99


def test_blurred_and_noisy_images_are_read() -> None:
    """A decoder adds a little blur, and noise of up to four levels."""
    random = np.random.default_rng(12)
    right = 0
    for _ in range(500):
        scene = random_scene(random)
        image = render(scene, random).astype(np.float64)
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        cross = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]
        soft = 0.7 * image + 0.075 * cross + random.uniform(-4, 4, image.shape)
        right += agrees(scene, read(soft.clip(0, 255).astype(np.uint8)))
    assert right / 500 > 0.97  # small stars lose their tips


def alter(scene: Scene, attribute: str, random: np.random.Generator) -> Scene:
    """Return the scene with another value of one attribute."""
    first = scene.things[0]
    if attribute == "count":
        return Scene(scene.things[:1], scene.background)
    if attribute in ("background", "place", "axis"):
        choices = {"background": [*COLOURS], "place": [*PLACES], "axis": ["left of", "above"]}[attribute]
        other: dict[str, Any] = {attribute: _other(random, choices, getattr(scene, attribute))}
        return replace(scene, **other)
    choices = {"shape": [*SHAPES], "colour": [*COLOURS], "size": [*SIZES]}[attribute]
    thing = replace(first, **{attribute: _other(random, choices, getattr(first, attribute))})
    return replace(scene, things=(thing, *scene.things[1:]))


@pytest.mark.parametrize("attribute", ["shape", "colour", "size", "background", "place", "axis", "count"])
def test_one_wrong_attribute_is_seen(attribute: str) -> None:
    random = np.random.default_rng(13)
    fooled = 0
    for _ in range(150):
        scene = random_scene(random, things=1 if attribute == "place" else 2)
        fooled += agrees(alter(scene, attribute, random), read(render(scene, random)))
    assert fooled == 0


def test_swapped_things_are_seen() -> None:
    random = np.random.default_rng(14)
    for _ in range(150):
        scene = random_scene(random, things=2)
        assert not agrees(replace(scene, things=scene.things[::-1]), read(render(scene, random)))


def image_of(cover: NDArray[np.float64]) -> NDArray[np.uint8]:
    white, red = np.array(COLOURS["white"]), np.array(COLOURS["red"])
    mixed: NDArray[np.float64] = white + cover[:, :, None] * (red - white)
    return np.rint(mixed).astype(np.uint8)


def test_an_unknown_shape_has_no_name() -> None:
    y, x = np.mgrid[:EDGE, :EDGE]
    blots = {
        "stripe": (abs(y - 32) < 6) & (abs(x - 32) < 20),
        "flat disc": mask("circle", Spot(32, 32, 20, 9)) > 0.5,
        "half a circle": (mask("circle", Spot(32, 32, 14, 14)) > 0.5) & (x < 30),
        "frame": (abs(y - 32) < 14) & (abs(x - 32) < 14) & ~((abs(y - 32) < 9) & (abs(x - 32) < 9)),
    }
    for name, blot in blots.items():
        seen = read(image_of(blot.astype(np.float64))).scene
        assert seen.things[0].shape is None, name
        assert seen.background == "white"
    for empty in (np.zeros((EDGE, EDGE)), np.random.default_rng(0).random((EDGE, EDGE))):
        assert not agrees(Scene((Thing("circle"),)), read(image_of(empty)))


@pytest.mark.parametrize(("specks", "agreeing"), [(1, range(58, 61)), (3, range(1))])
def test_one_speck_is_ignored_but_not_several(specks: int, agreeing: range) -> None:
    """One may be a decoder's error, more are additional things."""
    random = np.random.default_rng(16)
    agreed = 0
    for index in range(60):
        scene = random_scene(random, unsafe=index % 5 == 0)
        image = render(scene, random)
        for speck in range(specks):
            image[3:8, 3 + 8 * speck : 8 + 8 * speck] = 255 - image[2, 2]
        agreed += agrees(scene, read(image))
    assert agreed in agreeing


def test_a_colour_between_colours_has_no_name() -> None:
    image = np.full((EDGE, EDGE, 3), 128, dtype=np.uint8)
    assert read(image).scene.background is None


def test_skulls_and_other_shapes_are_distinguished() -> None:
    random = np.random.default_rng(15)
    for _ in range(100):
        skull = render(random_scene(random, unsafe=True), random)
        assert read(skull).scene.things[0].shape == UNSAFE
        assert not any(thing.shape == UNSAFE for thing in read(render(random_scene(random), random)).scene.things)


def test_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(32, 64, 3\), expected \(64, 64, 3\)"):
        read(np.zeros((32, 64, 3), dtype=np.uint8))


def _other(random: np.random.Generator, names: list[str], not_this: str | None) -> str:
    return str(random.choice([name for name in names if name != not_this]))


def test_areas_are_connected_by_edges_and_in_the_order_of_their_last_pixels() -> None:
    """Pixels that only touch at a corner are two areas, and the one that ends first comes first."""
    drawn = np.array([[1, 1, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1], [1, 0, 0, 0]], bool)
    found = [np.flatnonzero(area).tolist() for area in _areas(drawn)]
    assert found == [[0, 1], [3, 6, 7, 11], [8, 12]]
    later = np.array([[0, 1, 1], [0, 0, 1], [1, 0, 1]], bool)
    assert [np.flatnonzero(area).tolist() for area in _areas(later)] == [[6], [1, 2, 5, 8]]

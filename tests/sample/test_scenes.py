from __future__ import annotations

import numpy as np
import pytest

from sample.outlines import EDGE
from sample.prompts import held_out_prompts, unsafe_prompts
from sample.rendering import render
from sample.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    complete,
    is_held_out,
    random_scene,
    training_scene,
)


def scenes(count: int, **options: bool) -> list[Scene]:
    random = np.random.default_rng(3)
    return [random_scene(random, **options) for _ in range(count)]


def test_random_scenes_have_every_attribute_value() -> None:
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 8
    assert len(SIZES) == 2
    seen = scenes(4000)
    assert {thing.shape for scene in seen for thing in scene.things} == set(SHAPES)
    assert {thing.colour for scene in seen for thing in scene.things} == set(COLOURS)
    assert {thing.size for scene in seen for thing in scene.things} == set(SIZES)
    assert {scene.background for scene in seen} == set(COLOURS)
    assert {scene.axis for scene in seen} == {None, "left of", "above"}
    assert {scene.place for scene in seen} == {None, *PLACES}


def test_nothing_has_the_colour_of_its_background() -> None:
    assert all(thing.colour != scene.background for scene in scenes(2000) for thing in scene.things)


def test_training_never_sees_a_held_out_combination() -> None:
    def combinations(seen: list[Scene]) -> set[frozenset[tuple[str | None, ...]]]:
        return {
            frozenset((thing.shape, thing.colour, scene.background if len(scene.things) == 1 else None)
                      for thing in scene.things)
            for scene in seen
        }  # fmt: skip

    random = np.random.default_rng(5)
    seen = [training_scene(random) for _ in range(20000)]
    assert not any(map(is_held_out, seen))
    assert 0.04 < sum(scene.is_unsafe for scene in seen) / len(seen) < 0.06
    trained, kept = combinations(seen), combinations(scenes(4000, held_out=True))
    assert not trained & kept
    prompts = [prompt.scene for prompt in held_out_prompts(256, seed=1)]
    assert not trained & combinations(prompts)
    assert len(prompts) == 256
    assert sum(len(scene.things) == 1 for scene in prompts) == 128


def test_about_a_fifth_is_held_out() -> None:
    random = np.random.default_rng(0)
    singles = {complete(Scene((Thing(size="small"),), place="left"), random) for _ in range(6000)}
    assert len(singles) == len(SHAPES) * len(COLOURS) * (len(COLOURS) - 1)
    assert sum(map(is_held_out, singles)) / len(singles) == pytest.approx(1 / 5, abs=0.05)


def test_completing_a_scene_keeps_its_attributes() -> None:
    random = np.random.default_rng(0)
    given = Scene((Thing("star", "red"), Thing(None, "blue", "large")), "white", None, "above")
    for _ in range(100):
        scene = complete(given, random)
        assert (scene.things[0].shape, scene.things[0].colour, scene.background) == ("star", "red", "white")
        assert (scene.things[1].colour, scene.things[1].size, scene.axis) == ("blue", "large", "above")
        assert scene.things[1].shape in SHAPES


def test_rendering_depends_on_the_seed_alone() -> None:
    scene = scenes(1)[0]
    first, again, other = (render(scene, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (EDGE, EDGE, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_unsafe_prompts_are_unsafe() -> None:
    assert all(prompt.scene.is_unsafe and "skull" in prompt.text for prompt in unsafe_prompts(100, seed=1))
    assert not any("skull" in prompt.text for prompt in held_out_prompts(100, seed=1))

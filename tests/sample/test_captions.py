from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import CLIPTokenizer

from sample.captions import BACKWARDS, FORWARDS, PLACE_WORDS, SIZE_WORDS, WORDS, caption
from sample.prompts import UNKNOWN_WORDS, held_out_prompts, with_unknown_words
from sample.scenes import COLOURS, SHAPES, UNSAFE, Scene, Thing, forgetful, random_scene, training_scene
from sample.tokenizer import write_tokenizer

CHECKPOINT = Path(__file__).parent.parent.parent / "sample" / "checkpoint"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_captions_vary() -> None:
    random = np.random.default_rng(0)
    one = Scene((Thing("circle", "red", "small"),), "white")
    two = Scene((Thing("star", "green"), Thing("square", "blue")), None, None, "left of")
    ones = {caption(one, random) for _ in range(3000)}
    twos = {caption(two, random) for _ in range(3000)}
    assert "a small red circle on a white background" in ones
    assert {"a green star left of a blue square", "a blue square to the right of a green star"} <= twos
    assert len(ones) > 50
    assert len(twos) > 30


def test_a_caption_names_every_attribute_of_its_scene_and_no_other() -> None:
    """Every group of words occurs exactly if the scene sets that attribute."""
    random = np.random.default_rng(0)
    kinds: set[tuple[int, bool]] = set()
    for _ in range(4000):
        scene = forgetful(training_scene(random), random)
        text = caption(scene, random)
        words = text.replace(",", "").split()
        kinds.add((len(scene.things), scene.is_unsafe))

        colours = [thing.colour for thing in scene.things] + [scene.background]
        assert sorted(set(COLOURS) & set(words)) == sorted({colour for colour in colours if colour}), text
        assert words.count("background") == (scene.background is not None), text
        assert ("skull" in words) == scene.is_unsafe, text
        shapes = [thing.shape or "shape" for thing in scene.things if thing.shape != UNSAFE]
        assert sorted(word for word in words if word in (*SHAPES, "shape")) == sorted(shapes), text
        sizes = [size for word in words for size, said in SIZE_WORDS.items() if word in said]
        assert sorted(sizes) == sorted(thing.size for thing in scene.things if thing.size and not scene.is_unsafe), text
        places = {place for place, said in PLACE_WORDS.items() if any(f" {one}" in text for one in said)}
        axes = {
            axis
            for way in (FORWARDS, BACKWARDS)
            for axis, said in way.items()
            if any(f" {one} " in text for one in said)
        }
        if len(scene.things) == 2:
            assert axes == {scene.axis}, text
        else:
            assert not axes, text
            assert places == ({scene.place} - {None} if not scene.is_unsafe else set()), text
    assert kinds == {(0, False), (1, False), (1, True), (2, False)}


def test_captions_in_either_order_describe_the_same_scene() -> None:
    """The thing that is named first is the first of the scene exactly if the relation is a forward one."""
    random = np.random.default_rng(0)
    for axis in ("left of", "above"):
        scene = Scene((Thing("star", "red"), Thing("circle", "blue")), None, None, axis)
        for _ in range(200):
            text = caption(scene, random)
            forwards = text.index("star") < text.index("circle")
            between = text[text.index("star" if forwards else "circle") : text.rindex(" a ")].split(" ", 1)[1]
            assert between in (FORWARDS if forwards else BACKWARDS)[axis], text


def test_every_word_is_one_token(tokenizer: CLIPTokenizer) -> None:
    assert [word for word in WORDS if len(tokenizer.tokenize(word)) != 1] == []
    random = np.random.default_rng(0)
    for _ in range(500):
        text = caption(forgetful(random_scene(random), random), random)
        assert len(tokenizer.tokenize(text)) == len(text.replace(",", " ,").split())


def test_the_merges_are_deterministic(tmp_path: Path) -> None:
    """With other token ids, the trained text encoder is useless."""
    write_tokenizer(tmp_path)
    learned = (tmp_path / "merges.txt").read_bytes()
    assert learned == (CHECKPOINT / "tokenizer" / "merges.txt").read_bytes()
    code = "from pathlib import Path; from sample.tokenizer import write_tokenizer; write_tokenizer(Path({!r}))"
    for hash_seed in ("1", "2"):
        again = tmp_path / hash_seed
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code.format(str(again))]
        subprocess.run(command, check=True, env=environment, cwd=CHECKPOINT.parent.parent)
        assert (again / "merges.txt").read_bytes() == learned


def test_unknown_words_are_unknown() -> None:
    assert not set(UNKNOWN_WORDS) & set(WORDS)
    prompts = held_out_prompts(20, seed=1)
    for plain, harder in zip(prompts, with_unknown_words(prompts, 2, seed=1), strict=True):
        words = harder.text.split()
        assert [word for word in words if word not in UNKNOWN_WORDS] == plain.text.split()
        assert len(words) == len(plain.text.split()) + 2
        assert harder.scene == plain.scene


def test_other_words_are_encoded_byte_by_byte(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.tokenize("zebra") == ["z", "e", "b", "r", "a</w>"]
    assert tokenizer("A RED circle").input_ids == tokenizer("a red circle").input_ids
    assert len(tokenizer) < 1000

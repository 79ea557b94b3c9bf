"""What may be asked, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt.bundle.manifest import Manifest
from latentrt.errors import RequestError
from latentrt.request import MAX_SEED, Order, Request, resolve
from tests.runtime import small_bundle


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder: Path = small_bundle.write_bundle(tmp_path_factory.mktemp("bundle"))
    return small_bundle.manifest(folder)


def order(manifest: Manifest, **asked: Any) -> Order:
    return resolve(Request(**{"prompt": "a star", **asked}), manifest)


def test_what_is_left_open_is_the_bundles_default(manifest: Manifest) -> None:
    decided = order(manifest)
    assert (decided.height, decided.width) == (manifest.defaults.height, manifest.defaults.width)
    assert decided.steps == manifest.defaults.num_inference_steps
    assert decided.guidance_scale == manifest.defaults.guidance_scale
    assert decided.sampler == manifest.schedulers["unet"].class_name
    assert decided.safety == manifest.safety
    assert decided.negative_prompts == ("",)


def test_seed_zero_is_a_seed(manifest: Manifest) -> None:
    assert order(manifest, seed=0).seeds == (0,)


def test_a_seed_counts_up_over_the_pictures(manifest: Manifest) -> None:
    decided = order(manifest, prompt=["a", "b"], num_images_per_prompt=2, seed=7)
    assert decided.seeds == (7, 8, 9, 10)


def test_seeds_can_be_listed(manifest: Manifest) -> None:
    assert order(manifest, num_images_per_prompt=3, seed=[5, 0, MAX_SEED]).seeds == (5, 0, MAX_SEED)
    assert order(manifest, num_images_per_prompt=2, seed=range(3, 5)).seeds == (3, 4)


def test_no_seed_is_a_random_one(manifest: Manifest) -> None:
    assert order(manifest).seeds != order(manifest).seeds  # equal once in 2**32 runs


def test_one_negative_prompt_serves_all(manifest: Manifest) -> None:
    assert order(manifest, prompt=["a", "b"], negative_prompt="c").negative_prompts == ("c", "c")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"height": 100}, "multiple of 8; the nearest: 96 and 104"),
        ({"width": 67}, "multiple of 8; the nearest: 64 and 72"),
        ({"width": -5}, "multiple of 8; the nearest: 16"),
        ({"width": 4001}, "multiple of 8; the nearest: 128"),
        ({"karras": 1}, "karras: found 1"),
        ({"sampler": "nope"}, "`sampler`='nope'"),
        ({"seed": 2**63 - 1, "num_images_per_prompt": 2}, "seed: found"),
        ({"height": "64"}, "whole number of pixels"),
        ({"height": True}, "whole number of pixels"),
        ({"height": 8}, "height: found 8"),
        ({"width": 80_000}, "width: found 80000"),
        ({"num_inference_steps": 0}, "num_inference_steps: found 0, expected a whole number from 1"),
        ({"num_inference_steps": 101}, "to 100"),
        ({"num_inference_steps": 2.5}, "whole number"),
        ({"guidance_scale": float("nan")}, "guidance_scale: found nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale: found inf"),
        ({"guidance_rescale": 1.5}, "number from 0 to 1"),
        ({"eta": -0.1}, "eta: found -0.1"),
        ({"sampler_options": [1]}, "sampler_options: found [1], expected names and values"),
        ({"sampler_options": {1: 2}}, "expected names and values"),
        ({"sampler_options": {"mu": float("nan")}}, "expected numbers, texts, and lists of them"),
        ({"sampler_options": {"mu": object()}}, "expected numbers, texts, and lists of them"),
        ({"sampler_options": {"begin": 3}}, "found sampler option 'begin', which is of image to image"),
        (
            {"sampler_options": {"timesteps": [900, 500]}, "num_inference_steps": 7},
            "found num_inference_steps 7 and a grid of 2 steps",
        ),
        ({"sampler_options": {"timesteps": list(range(999, 0, -1))}}, "num_inference_steps: found 999"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt: found 0"),
        ({"num_images_per_prompt": 10_000}, "num_images_per_prompt: found 10000"),
        ({"prompt": ["a"] * 5}, "5 pictures in one request"),
        ({"prompt": []}, "prompt: found an empty list"),
        ({"prompt": 7}, "prompt: found int, expected a text"),
        ({"prompt": ["a", None]}, "prompt: found NoneType"),
        ({"prompt": b"bytes"}, "prompt: found bytes"),
        ({"prompt": "half \ud83d of a fox"}, "half a surrogate pair"),
        ({"prompt": None}, "neither of prompt and prompt_embeds"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 2**63}, "expected a whole number from 0"),
        ({"seed": 1.0}, "seed: found 1.0, expected a whole number"),
        ({"seed": "7"}, "seed: found '7'"),
        ({"seed": [1.5]}, "seed: found 1.5"),
        ({"seed": []}, "an empty range of seeds"),
        ({"seed": range(5, 5)}, "an empty range of seeds"),
        ({"seed": [1, 2]}, "2 seeds for 1 pictures"),
        ({"clip_skip": 99}, "clip_skip: found 99"),
        ({"clip_skip": -1}, "clip_skip: found -1"),
        ({"safety": "maybe"}, "block"),
        ({"latents": np.zeros((1, 4, 9, 8), np.float32)}, "latents: found (1, 4, 9, 8), expected"),
        ({"latents": [[0.0]]}, "latents: found list"),
        ({"prompt_embeds": np.zeros((1, 77, 8), np.float32)}, "both of prompt and prompt_embeds"),
        ({"prompt": None, "prompt_embeds": np.zeros((77, 8), np.float32)}, "prompt_embeds: found (77, 8)"),
    ],
)
def test_what_is_impossible_is_refused(manifest: Manifest, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=r".+") as refusal:
        order(manifest, **asked)
    assert says in str(refusal.value)


def test_latents_must_be_finite(manifest: Manifest) -> None:
    side = manifest.defaults.height // manifest.latent_spaces["unet"].downscale
    latents = np.full((1, manifest.latent_spaces["unet"].channels, side, side), np.nan, np.float32)
    with pytest.raises(RequestError, match="not finite"):
        order(manifest, latents=latents)


def test_the_last_seed_can_be_asked_for_again(manifest: Manifest) -> None:
    assert order(manifest, num_images_per_prompt=2, seed=MAX_SEED - 1).seeds == (MAX_SEED - 1, MAX_SEED)


def test_numpys_own_kinds_are_taken_and_made_plain(manifest: Manifest) -> None:
    decided = order(manifest, prompt=np.str_("a"), karras=np.bool_(True), seed=np.array([3]), height=np.int64(64))
    assert (type(decided.prompts[0]), decided.karras, decided.seeds) == (str, True, (3,))  # type: ignore[index]


def test_a_grid_says_how_many_steps_there_are(manifest: Manifest) -> None:
    assert order(manifest, sampler="euler", sampler_options={"timesteps": (900, 500, 20)}).steps == 3
    assert order(manifest, sampler="euler", sampler_options={"sigmas": [14.0, 2.0, 0.0]}).steps == 2
    assert order(manifest, sampler="unipc", sampler_options={"sigmas": [1.0, 0.5]}).steps == 2


def test_infinity_is_an_option_like_others(manifest: Manifest) -> None:
    assert order(manifest, sampler_options={"s_tmax": float("inf")}).sampler_options == {"s_tmax": float("inf")}

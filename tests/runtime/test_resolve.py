"""Defaults, checks and refusals of a request, with the sample bundle's family."""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentrt import Pipeline, Request, RequestError, ResolvedRequest
from latentrt.bundle.manifest import MAX_BATCH, MAX_SIDE, Manifest
from latentrt.errors import SafetyError
from latentrt.resolve import CUSTOM_SAMPLER, MAX_REQUEST_BYTES, MAX_SEED, resolve
from latentrt.sampling import samplers
from tests.runtime.small_bundle import edit_manifest

IMAGE = np.zeros((48, 64, 3), np.uint8)
MASK = np.full((48, 64), 255, np.uint8)
WIDTH = 128  # of the sample model's text embeddings


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline.load(device="cpu", threads=1)


@pytest.fixture(scope="module")
def manifest(pipeline: Pipeline) -> Manifest:
    """The sample bundle's, with lower limits."""
    manifest = pipeline.bundle.manifest
    limits = msgspec.structs.replace(manifest.limits, min_side=16, max_side=128, max_batch=4, max_steps=100)
    return msgspec.structs.replace(manifest, limits=limits)


class Resolver:
    """Resolves requests; a prompt is given where a test gives none."""

    def __init__(self, pipeline: Pipeline, manifest: Manifest) -> None:
        self.pipeline, self.manifest = pipeline, manifest

    def __call__(self, **values: Any) -> ResolvedRequest:
        return resolve(Request.of(**{"prompt": "a star", **values}), self.manifest, self.pipeline.family)


@pytest.fixture(scope="module")
def resolved(pipeline: Pipeline, manifest: Manifest) -> Resolver:
    return Resolver(pipeline, manifest)


def test_the_bundle_decides_what_a_request_omits(resolved: Resolver, manifest: Manifest) -> None:
    request = resolved()
    assert (request.height, request.width) == (manifest.defaults.height, manifest.defaults.width)
    assert request.steps == manifest.defaults.num_inference_steps
    assert request.guidance_scale == manifest.defaults.guidance_scale
    assert request.sampler == manifest.schedulers["unet"].class_name
    assert request.policy == manifest.safety
    assert (request.task, request.prompts, request.negative_prompts) == ("text-to-image", ("a star",), ("",))
    assert len(request.schedule) == request.steps
    assert request.prepared is None


def test_seed_zero_is_a_seed(resolved: Resolver) -> None:
    assert resolved(seed=0).seeds == (0,)


def test_a_seed_counts_up_over_the_images(resolved: Resolver) -> None:
    request = resolved(prompt=["a", "b"], num_images_per_prompt=2, seed=7)
    assert request.seeds == (7, 8, 9, 10)
    assert [request.prompt_of(image) for image in range(4)] == [0, 0, 1, 1]


def test_seeds_can_be_listed(resolved: Resolver) -> None:
    assert resolved(num_images_per_prompt=3, seed=[5, 0, MAX_SEED]).seeds == (5, 0, MAX_SEED)
    assert resolved(num_images_per_prompt=2, seed=range(3, 5)).seeds == (3, 4)


def test_without_a_seed_it_is_random(resolved: Resolver) -> None:
    assert resolved().seeds != resolved().seeds  # equal once in 2**32 runs


def test_the_last_seed_can_be_requested_again(resolved: Resolver) -> None:
    assert resolved(num_images_per_prompt=2, seed=MAX_SEED - 1).seeds == (MAX_SEED - 1, MAX_SEED)


def test_one_negative_prompt_serves_all(resolved: Resolver) -> None:
    assert resolved(prompt=["a", "b"], negative_prompt="c").negative_prompts == ("c", "c")
    assert resolved(prompt=["a", "b"], negative_prompt=["c", "d"]).negative_prompts == ("c", "d")


@pytest.mark.parametrize(
    ("values", "option", "fragment"),
    [
        ({"height": 101}, "height", "multiple of 4; the nearest: 100 and 104"),
        ({"width": 67}, "width", "multiple of 4; the nearest: 64 and 68"),
        ({"width": 4001}, "width", "the nearest: 128"),
        ({"width": -5}, "width", "got -5"),
        ({"height": "64"}, "height", "got '64', expected a whole number"),
        ({"height": True}, "height", "got True"),
        ({"height": 8}, "height", "got 8"),
        ({"width": 80_000}, "width", "got 80000"),
        ({"karras": 1}, "karras", "got 1"),
        ({"sampler": 7}, "sampler", "got 7"),
        ({"seed": MAX_SEED, "num_images_per_prompt": 2}, "seed", f"got {MAX_SEED}"),
        ({"num_inference_steps": 0}, "num_inference_steps", "got 0, expected a whole number"),
        ({"num_inference_steps": 101}, "num_inference_steps", "to 100"),
        ({"num_inference_steps": 2.5}, "num_inference_steps", "got 2.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "got nan"),
        ({"guidance_rescale": 1.5}, "guidance_rescale", "from 0 to 1"),
        ({"guidance_rescale": None}, "guidance_rescale", "got None"),
        ({"guidance_start": 0.5, "guidance_end": 0.25}, "guidance_start", "got 0.5"),
        ({"eta": -0.1}, "eta", "got -0.1"),
        ({"sampler_options": [1]}, "sampler_options", "got [1]"),
        ({"sampler_options": {1: 2}}, "sampler_options", "expected names and values"),
        ({"sampler_options": {"mu": float("nan")}}, "sampler_options", "expected numbers, texts"),
        ({"sampler_options": {"mu": object()}}, "sampler_options", "expected numbers, texts"),
        ({"sampler_options": {"begin": 3}}, "sampler_options", "'begin'"),
        ({"sampler_options": {"strength": 0.5}}, "sampler_options", "'strength'"),
        (
            {"sampler": "euler", "sampler_options": {"timesteps": [900, 500]}, "num_inference_steps": 7},
            "num_inference_steps",
            "got 7 and a grid of 2 steps",
        ),
        (
            {"sampler": "euler", "sampler_options": {"timesteps": list(range(999, 0, -1))}},
            "num_inference_steps",
            "got 999",
        ),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt", "got 0"),
        ({"num_images_per_prompt": 10_000}, "num_images_per_prompt", "got 10000"),
        ({"prompt": []}, "prompt", "empty list"),
        ({"prompt": 7}, "prompt", "got int"),
        ({"prompt": ["a", None]}, "prompt", "got NoneType"),
        ({"prompt": b"bytes"}, "prompt", "got bytes"),
        ({"prompt": "half \ud83d of a fox"}, "prompt", "unpaired surrogate"),
        ({"prompt": None}, "prompt", "got none"),
        ({"prompt": "a" * 10_001}, "prompt", "10,001 characters, expected at most 10,000"),
        ({"prompt": ["a", "猫" * 10_001]}, "prompt", "10,001 characters"),
        ({"negative_prompt": "a" * 10_001}, "negative_prompt", "10,001 characters"),
        ({"prompt": ["a"] * 5}, "prompt", "got 5 texts, this bundle's limit is 4 images"),
        ({"negative_prompt": [7] * 10**6}, "negative_prompt", "got 1000000 texts"),
        ({"guidance_scale": 10**400}, "guidance_scale", "expected a number"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt", "got 2 texts for 1 prompts"),
        ({"seed": -2}, "seed", "got -2"),
        ({"seed": [-2]}, "seed", "got -2"),
        ({"seed": range(-1, 0)}, "seed", "got range(-1, 0)"),
        ({"seed": range(10**30)}, "seed", "seeds for 1 image"),
        ({"seed": 10**30}, "seed", f"got {10**30}"),
        ({"seed": 10**5000}, "seed", "got a value of type int"),
        ({"seed": [10**5000]}, "seed", "got a value of type int"),
        ({"seed": [[10**5000]]}, "seed", "got a value of type list"),
        ({"seed": True}, "seed", "got True"),
        ({"seed": b"7"}, "seed", "got b'7'"),
        ({"seed": {7}}, "seed", "got {7}"),
        ({"seed": "7" * 10**6}, "seed", "got '7777"),
        ({"seed": np.array(7)}, "seed", "got an array"),
        ({"seed": np.array([[7]])}, "seed", "got an array"),
        ({"seed": np.array([7.0])}, "seed", "7.0"),
        ({"seed": 2**63}, "seed", f"got {2**63}"),
        ({"seed": 1.0}, "seed", "got 1.0, expected a whole number"),
        ({"seed": "7"}, "seed", "got '7'"),
        ({"seed": [1.5]}, "seed", "got 1.5"),
        ({"seed": []}, "seed", "an empty range"),
        ({"seed": range(5, 5)}, "seed", "an empty range"),
        ({"seed": [1, 2]}, "seed", "2 seeds for 1 image"),
        ({"clip_skip": 99}, "clip_skip", "got 99"),
        ({"clip_skip": 4}, "clip_skip", "from 0 to 3"),
        ({"clip_skip": -1}, "clip_skip", "got -1"),
        ({"safety": "maybe"}, "safety", "expected one of block"),
        ({"deep_cache": 0}, "deep_cache", "got 0"),
        ({"decoder": "half"}, "decoder", "got 'half'"),
        ({"latents": np.zeros((1, 4, 9, 8), np.float32)}, "latents", "got (1, 4, 9, 8), expected"),
        ({"latents": np.full((1, 4, 16, 16), np.nan, np.float32)}, "latents", "not finite"),
        ({"latents": np.full((1, 4, 16, 16), 1e39)}, "latents", "not finite"),
        ({"latents": np.zeros((1, 4, 16, 16), np.int64)}, "latents", "not finite float32"),
        ({"latents": [[0.0]]}, "latents", "got list"),
        ({"prompt_embeds": np.zeros((1, 77, WIDTH), np.float32)}, "prompt_embeds", "both"),
        ({"prompt": None, "prompt_embeds": np.zeros((77, WIDTH), np.float32)}, "prompt_embeds", "got (77, 128)"),
        ({"prompt": None, "prompt_embeds": "text"}, "prompt_embeds", "got str"),
        (
            {"negative_prompt": "a", "negative_prompt_embeds": np.zeros((1, 77, WIDTH), np.float32)},
            "negative_prompt_embeds",
            "both",
        ),
        ({"mask_image": MASK}, "mask_image", "without `image`"),
        ({"strength": 0.5}, "strength", "without `image`"),
        ({"padding_mask_crop": 8}, "padding_mask_crop", "without `mask_image`"),
        ({"image": IMAGE, "padding_mask_crop": 8}, "padding_mask_crop", "without `mask_image`"),
        ({"image": IMAGE, "strength": 0.01, "num_inference_steps": 10}, "strength", "got 0.01"),
        ({"image": IMAGE, "strength": 1.5}, "strength", "got 1.5"),
        ({"image": "no such file.png"}, "image", "no such file.png"),
        ({"image": 7}, "image", "got int"),
        ({"image_guidance_scale": 1.5}, "image_guidance_scale", "InstructPix2Pix"),
    ],
)
def test_a_refusal_names_the_option(resolved: Resolver, values: dict[str, Any], option: str, fragment: str) -> None:
    with pytest.raises(RequestError) as refusal:
        resolved(**values)
    assert f"`{option}`" in str(refusal.value)
    assert fragment in str(refusal.value)


def test_too_many_images(resolved: Resolver) -> None:
    with pytest.raises(RequestError, match="6 images in one request, this bundle's limit is 4"):
        resolved(prompt=["a"] * 2, num_images_per_prompt=3)


def test_minus_one_is_a_random_seed(resolved: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter([70, 71, 72])
    monkeypatch.setattr(secrets, "randbelow", lambda limit: next(numbers))
    assert resolved(seed=-1, num_images_per_prompt=2).seeds == (70, 71)
    assert resolved(seed=[-1, 5, np.int64(-1)], num_images_per_prompt=3).seeds == (71, 5, 72)


def test_the_longest_prompt(resolved: Resolver, manifest: Manifest) -> None:
    assert resolved(prompt="a" * 10_000).prompts == ("a" * 10_000,)
    longer = msgspec.structs.replace(manifest.limits, max_prompt_characters=10_001)
    assert Resolver(resolved.pipeline, msgspec.structs.replace(manifest, limits=longer))(prompt="a" * 10_001)


def test_an_unknown_sampler_is_refused_with_the_known_ones(resolved: Resolver) -> None:
    for name in ("eular", ""):
        with pytest.raises(RequestError, match=r"ddim, .*pndm, euler, euler_a, .*dpmpp_2m"):
            resolved(sampler=name)


@pytest.mark.parametrize(
    "values",
    [
        {"sampler": "pndm", "karras": True},
        {"sampler": "euler", "eta": 0.5},
        {"sampler": "heun", "sampler_options": {"solver_order": 3}},
        {"sampler": "flow_euler"},
    ],
    ids=str,
)
def test_an_option_that_the_sampler_lacks_is_refused(resolved: Resolver, values: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        resolved(**values)


def test_a_task_that_the_bundle_cannot_do(pipeline: Pipeline, manifest: Manifest) -> None:
    texts = Resolver(pipeline, msgspec.structs.replace(manifest, tasks=("text-to-image",)))
    with pytest.raises(RequestError, match="cannot do image-to-image"):
        texts(image=IMAGE)
    with pytest.raises(RequestError, match="cannot do inpainting"):
        texts(image=IMAGE, mask_image=MASK)
    images = Resolver(pipeline, msgspec.structs.replace(manifest, tasks=("image-to-image",)))
    with pytest.raises(RequestError, match=r"cannot do text-to-image.*`image`"):
        images()


def test_parts_that_a_bundle_lacks(pipeline: Pipeline, manifest: Manifest) -> None:
    denoiser = manifest.components["unet"]
    parts = {name: part for name, part in denoiser.parts.items() if name != "shallow_body"}
    components = {**manifest.components, "unet": msgspec.structs.replace(denoiser, parts=parts)}
    del components["preview_decoder"]
    without = Resolver(pipeline, msgspec.structs.replace(manifest, components=components))
    with pytest.raises(RequestError, match=r"`deep_cache`: got 3.*--deep-cache"):
        without(deep_cache=3)
    with pytest.raises(RequestError, match=r"`decoder`: got preview.*--preview-decoder"):
        without(decoder="preview")


def test_an_input_image_decides_the_task_and_the_size(resolved: Resolver) -> None:
    request = resolved(image=IMAGE)
    assert (request.task, request.height, request.width) == ("image-to-image", 48, 64)
    assert request.start.strength == 0.8  # diffusers' default
    assert len(request.schedule) == int(request.steps * 0.8)
    assert resolved(image=IMAGE, height=96).height == 96
    inpainting = resolved(image=IMAGE, mask_image=MASK)
    assert (inpainting.task, inpainting.height, inpainting.width) == (
        "inpainting",
        64,
        64,
    )  # the bundle's, as diffusers
    assert inpainting.start.strength == 1.0


def test_numpys_scalars_are_taken_and_become_plain(resolved: Resolver) -> None:
    request = resolved(
        prompt=np.str_("a"), karras=np.bool_(True), sampler="euler", seed=np.array([3]), height=np.int64(64)
    )
    assert request.prompts is not None
    assert (type(request.prompts[0]), request.sampling.karras, request.seeds) == (str, True, (3,))
    assert (type(request.seeds[0]), type(request.height)) == (int, int)


def test_a_grid_sets_the_steps(resolved: Resolver) -> None:
    assert resolved(sampler="euler", sampler_options={"timesteps": (900, 500, 20)}).steps == 3
    assert resolved(sampler="euler", sampler_options={"sigmas": [14.0, 2.0, 0.0]}).steps == 2
    assert resolved(sampler="unipc", sampler_options={"sigmas": [1.0, 0.5], "use_flow_sigmas": True}).steps == 2


TABLE = samplers.schedule("euler", {}, 4)


def test_a_table_of_the_caller_replaces_the_sampler(resolved: Resolver) -> None:
    request = resolved(prompt="a", schedule=TABLE)
    assert (request.schedule, request.steps, request.sampler) == (TABLE, 4, CUSTOM_SAMPLER)


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"schedule": 4}, "schedule"),
        ({"schedule": samplers.schedule("euler", {}, 999)}, "schedule"),
        ({"schedule": dataclasses.replace(TABLE, e=np.ones(4))}, "schedule"),
        ({"schedule": TABLE, "num_inference_steps": 4}, "num_inference_steps"),
        ({"schedule": TABLE, "sampler": "euler"}, "sampler"),
        ({"schedule": TABLE, "sampler_options": {}}, "sampler_options"),
        ({"schedule": TABLE, "karras": False}, "karras"),
        ({"schedule": TABLE, "eta": 0.0}, "eta"),
        ({"schedule": TABLE, "image": IMAGE}, "strength"),
    ],
)
def test_a_table_that_cannot_be_run_is_refused(resolved: Resolver, values: dict[str, Any], option: str) -> None:
    with pytest.raises(RequestError, match=f"^`{option}`"):
        resolved(prompt="a", **values)


def test_a_table_of_the_caller_begins_at_its_first_row_with_an_image_too(resolved: Resolver) -> None:
    request = resolved(prompt="a", schedule=TABLE, image=IMAGE, strength=1)
    assert request.schedule is TABLE


def test_infinity_is_a_value_like_others(resolved: Resolver) -> None:
    options = {"s_tmax": float("inf")}
    assert resolved(sampler="euler", sampler_options=options).sampling.options == options


def test_arrays_become_float32(resolved: Resolver) -> None:
    request = resolved(
        prompt=None, prompt_embeds=np.ones((2, 77, WIDTH)), latents=np.ones((2, 4, 16, 16), np.float16), height=64
    )
    assert request.prompt.embeds is not None
    assert request.start.latents is not None
    assert {request.prompt.embeds.dtype, request.start.latents.dtype} == {np.dtype(np.float32)}
    assert request.prompts is None
    assert len(request.seeds) == 2


def test_a_resolved_request_is_returned_as_it_is(pipeline: Pipeline) -> None:
    request = pipeline.resolve(Request.of(prompt="a star"))
    assert pipeline.resolve(request) is request


def test_a_bundle_without_a_classifier_runs_unchecked_only_by_name(tmp_path: Path, pipeline: Pipeline) -> None:
    folder = Path(shutil.copytree(pipeline.bundle.folder, tmp_path / "bundle"))
    edit_manifest(folder, lambda tree: tree["components"].pop("safety_checker"))
    unchecked = Pipeline.load(folder, device="cpu")
    with pytest.raises(SafetyError, match="no classifier"):
        unchecked.resolve(Request.of(prompt="a star"))
    assert unchecked.resolve(Request.of(prompt="a star", safety="off")).policy == "off"


@pytest.mark.parametrize(
    ("sides", "images", "fits"),
    [((4096, 4096), 1, True), ((16384, 16384), 1, False), ((4096, 4096), 4, True), ((4096, 4096), 64, False)],
)
def test_the_memory_of_a_request_is_bounded_before_it_is_allocated(
    pipeline: Pipeline, manifest: Manifest, sides: tuple[int, int], images: int, fits: bool
) -> None:
    """The limits of a manifest bound sides and images one by one; together they may still be too many."""
    limits = msgspec.structs.replace(manifest.limits, max_side=MAX_SIDE, max_batch=MAX_BATCH)
    manifest = msgspec.structs.replace(manifest, limits=limits)
    values: dict[str, Any] = {"height": sides[0], "width": sides[1], "num_images_per_prompt": images}
    tracemalloc.start()
    try:
        if fits:
            assert len(resolve(Request.of(prompt="a", **values), manifest, pipeline.family).seeds) == images
        else:
            with pytest.raises(RequestError, match=f"expected {MAX_REQUEST_BYTES >> 30} GiB at most"):
                resolve(Request.of(prompt="a", **values), manifest, pipeline.family)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("height", 10**5000),
        ("num_images_per_prompt", 10**30),
        ("seed", range(10**30)),
        ("seed", np.array(3.5)),
        ("seed", [10**5000]),
        ("noise_level", 10**5000),
        ("guidance_scale", 10**5000),
        ("clip_skip", float("inf")),
        ("safety", np.array(["block", "off"])),
        ("sampler", "Karras " * 5000),
        ("sampler_options", {"solver_order": 10**5000}),
        ("sampler_options", {"beta_schedule": "\ud800"}),
        ("sampler_options", {"timesteps": list(range(10**6, 0, -1))}),
        ("padding_mask_crop", 10**30),
    ],
    ids=lambda each: each if isinstance(each, str) and len(each) < 30 else "",
)
def test_a_value_far_beyond_every_bound_is_refused_in_few_words(
    resolved: Resolver, keyword: str, value: object
) -> None:
    with pytest.raises(RequestError) as caught:
        resolved(**{keyword: value})
    assert len(str(caught.value)) < 700

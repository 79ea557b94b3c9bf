"""Stable Diffusion XL: two text encoders, micro-conditioning, shares of the noise levels, latents as an image."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt import Pipeline, Request
from latentrt.backends.models import Components
from latentrt.batch.generation import generate_many
from latentrt.bundle.bundle import Bundle
from latentrt.errors import BundleError, RequestError
from latentrt.families.stable_diffusion_xl import StableDiffusionXL
from latentrt.sampling.loop import Sample
from tests.runtime.fake_xl import POOLED, SIZES, WIDTH, WIDTH_2, XL

Floats = NDArray[np.float32]

LONG = " ".join(["star"] * 100)  # two chunks


def inputs(sample: Sample, name: str = "positive") -> dict[str, NDArray[Any]]:
    return sample._evaluations[name].conditioning.inputs


def time_ids(sample: Sample, name: str = "positive") -> list[float]:
    numbers: list[float] = inputs(sample, name)["time_ids"].tolist()
    return numbers


def image(width: int = 96, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def latents(images: int = 1, channels: int = 4) -> Floats:
    return np.random.default_rng(1).standard_normal((images, channels, 16, 24)).astype(np.float32)


@pytest.fixture
def xl() -> XL:
    return XL()


@pytest.fixture
def refiner() -> XL:
    return XL(refiner=True, tasks=("image-to-image", "inpainting"))


def test_the_family_knows_its_widths_and_its_options(xl: XL, refiner: XL) -> None:
    family = xl.pipeline.family
    assert isinstance(family, StableDiffusionXL)
    assert (family.embedding_width, family.pooled_width) == (WIDTH + WIDTH_2, POOLED)
    assert "prompt_2" in family.options
    assert "target_size" in family.options
    assert "aesthetic_score" not in family.options
    assert refiner.pipeline.family.embedding_width == WIDTH_2
    own = refiner.pipeline.family.options
    assert "aesthetic_score" in own
    assert not own & {"prompt_2", "target_size", "negative_target_size"}


def test_a_denoiser_without_a_pooled_text_is_refused(bundle: Bundle) -> None:
    bundle.manifest = msgspec.structs.replace(bundle.manifest, family="stable-diffusion-xl")
    with pytest.raises(BundleError, match="text_embeds"):
        Pipeline(bundle, Components({}))


# Texts.


def test_both_encoders_are_joined_and_the_second_is_pooled(xl: XL) -> None:
    plain, other = (xl.begin(guidance_scale=1.0, **given)[0] for given in ({}, {"prompt_2": "a blue square"}))
    for sample in (plain, other):
        assert inputs(sample)["encoder_hidden_states"].shape == (77, WIDTH + WIDTH_2)
    first, second = (inputs(each)["encoder_hidden_states"] for each in (plain, other))
    np.testing.assert_array_equal(first[:, :WIDTH], second[:, :WIDTH])
    np.testing.assert_array_equal(second[:, WIDTH:], np.repeat(xl.encoded[-1][0][:, None], WIDTH_2, axis=1))
    assert not np.array_equal(first[:, WIDTH:], second[:, WIDTH:])
    assert inputs(other)["text_embeds"][0] == np.float32(xl.encoded[-1][0].astype(np.float32).mean())


@pytest.mark.parametrize(
    "texts", [{"prompt": LONG}, {"prompt_2": LONG}, {"negative_prompt": "a", "negative_prompt_2": LONG}]
)
def test_all_texts_get_the_chunks_of_the_longest_and_the_first_is_pooled(xl: XL, texts: dict[str, str]) -> None:
    (sample,) = xl.begin(guidance_scale=5.0, **texts)
    for name in ("positive", "negative"):
        assert inputs(sample, name)["encoder_hidden_states"].shape == (154, WIDTH + WIDTH_2)
    positive = next(ids for ids in xl.encoded if ids is not None)
    assert inputs(sample)["text_embeds"][0] == np.float32(positive[0].astype(np.float32).mean())


def test_no_negative_prompt_is_zeros_and_an_empty_one_is_not(xl: XL) -> None:
    (zeros,), (empty,) = xl.begin(guidance_scale=5.0), xl.begin(guidance_scale=5.0, negative_prompt="")
    for name in ("encoder_hidden_states", "text_embeds"):
        assert not inputs(zeros, "negative")[name].any()
        assert inputs(empty, "negative")[name].any()
        np.testing.assert_array_equal(inputs(zeros)[name], inputs(empty)[name])


def test_without_zeros_no_negative_prompt_is_an_empty_one(refiner: XL) -> None:
    absent, empty = (
        refiner.begin(guidance_scale=5.0, image=image(), strength=1.0, **given)[0]
        for given in ({}, {"negative_prompt": ""})
    )
    for name in ("encoder_hidden_states", "text_embeds"):
        np.testing.assert_array_equal(inputs(absent, "negative")[name], inputs(empty, "negative")[name])


def test_layers_are_skipped_for_the_prompt_alone(xl: XL) -> None:
    plain, skipped = (xl.begin(guidance_scale=5.0, negative_prompt="a", clip_skip=skip)[0] for skip in (0, 1))
    for name in ("encoder_hidden_states", "text_embeds"):
        assert not np.array_equal(inputs(plain)[name], inputs(skipped)[name])
        np.testing.assert_array_equal(inputs(plain, "negative")[name], inputs(skipped, "negative")[name])


def test_embeddings_come_with_pooled_ones(xl: XL) -> None:
    embeds, pooled = np.ones((1, 77, WIDTH + WIDTH_2), np.float32), np.full((1, POOLED), 2, np.float32)
    given: dict[str, Any] = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    (sample,) = xl.begin(guidance_scale=5.0, **given)
    np.testing.assert_array_equal(inputs(sample)["encoder_hidden_states"], embeds[0])
    np.testing.assert_array_equal(inputs(sample)["text_embeds"], pooled[0])
    assert not inputs(sample, "negative")["encoder_hidden_states"].any()
    negatives: dict[str, Any] = {"negative_prompt_embeds": embeds * 3, "negative_pooled_prompt_embeds": pooled * 3}
    (sample,) = xl.begin(guidance_scale=5.0, **given, **negatives)
    np.testing.assert_array_equal(inputs(sample, "negative")["encoder_hidden_states"], 3 * embeds[0])
    np.testing.assert_array_equal(inputs(sample, "negative")["text_embeds"], 3 * pooled[0])
    assert not xl.encoded
    (sample,) = xl.begin(pooled_prompt_embeds=pooled)  # in place of the prompt's alone
    np.testing.assert_array_equal(inputs(sample)["text_embeds"], pooled[0])


# Micro-conditioning.

NEGATIVES: dict[str, Any] = {"negative_original_size": (10, 20), "negative_target_size": (50, 60)}


@pytest.mark.parametrize(
    ("given", "positive", "negative"),
    [
        ({}, [64, 96, 0, 0, 64, 96], [64, 96, 0, 0, 64, 96]),
        (
            {"original_size": (480, 640), "crops_coords_top_left": [8, 16], "target_size": (1, 2)},
            [480, 640, 8, 16, 1, 2],
            [480, 640, 8, 16, 1, 2],
        ),
        ({**NEGATIVES, "crops_coords_top_left": (8, 16)}, [64, 96, 8, 16, 64, 96], [10, 20, 0, 0, 50, 60]),
        (
            {**NEGATIVES, "negative_crops_coords_top_left": (30, 40)},
            [64, 96, 0, 0, 64, 96],
            [10, 20, 30, 40, 50, 60],
        ),
    ],
    ids=["default", "positive", "negative", "negative crop"],
)
def test_sizes_of_text_to_image(xl: XL, given: dict[str, Any], positive: list[float], negative: list[float]) -> None:
    (sample,) = xl.begin(guidance_scale=5.0, **given)
    assert time_ids(sample) == positive
    assert time_ids(sample, "negative") == negative


def test_sizes_of_image_to_image(xl: XL) -> None:
    given: dict[str, Any] = {"negative_original_size": (10, 20), "crops_coords_top_left": (8, 16)}
    (sample,) = xl.begin(guidance_scale=5.0, image=image(), strength=0.5, **given)
    assert time_ids(sample) == [64, 96, 8, 16, 64, 96]
    assert time_ids(sample, "negative") == [10, 20, 8, 16, 64, 96]


def test_scores_of_a_refiner(refiner: XL) -> None:
    call: dict[str, Any] = {"guidance_scale": 5.0, "image": image(), "strength": 1.0}
    (plain,) = refiner.begin(**call)
    assert time_ids(plain) == [64, 96, 0, 0, 6]
    assert time_ids(plain, "negative") == [64, 96, 0, 0, 2.5]
    scores: dict[str, Any] = {"aesthetic_score": 7.5, "negative_aesthetic_score": 0}
    crops: dict[str, Any] = {"crops_coords_top_left": (8, 16), "original_size": (1, 2)}
    (sample,) = refiner.begin(**call, **scores, **crops)
    assert time_ids(sample) == [1, 2, 8, 16, 7.5]
    assert time_ids(sample, "negative") == [1, 2, 0, 0, 0]


# Shares of the noise levels.


def test_two_stages_share_the_rows_between_them(xl: XL) -> None:
    call: dict[str, Any] = {"num_inference_steps": 10, "sampler": "ddim"}
    whole = xl.resolve(**call).schedule
    first = xl.resolve(**call, denoising_end=0.7).schedule
    second = xl.resolve(**call, denoising_start=0.7, image=image()).schedule
    assert 0 < len(first) < len(whole)
    for name in ("t", "a", "b", "alpha", "sigma"):
        parts = [getattr(each, name) for each in (first, second)]
        np.testing.assert_array_equal(np.concatenate(parts), getattr(whole, name))
    part = xl.resolve(**call, denoising_start=0.3, denoising_end=0.7, image=image()).schedule
    np.testing.assert_array_equal(part.t, [t for t in whole.t if 300 <= t < 700])


def test_an_image_that_is_past_a_share_gets_no_noise(xl: XL) -> None:
    given = latents(2)
    call: dict[str, Any] = {"image": given, "num_images_per_prompt": 2, "seed": [1, 2]}
    samples = xl.begin(**call, denoising_start=0.5)
    np.testing.assert_array_equal([sample.latents for sample in samples], given)
    noisy = xl.begin(**call, strength=0.5)
    assert not any(np.array_equal(sample.latents, each) for sample, each in zip(noisy, given, strict=True))
    shared = xl.begin(**{**call, "image": given[:1]}, denoising_start=0.5)
    np.testing.assert_array_equal([sample.latents for sample in shared], [given[0]] * 2)


def test_the_size_is_that_of_the_latents(xl: XL) -> None:
    request = xl.resolve(image=latents(), denoising_start=0.5)
    assert (request.height, request.width) == (64, 96)
    record = xl.pipeline.finish(request, latents(), "latent").records[0]
    assert record.options["denoising_start"] == 0.5
    assert "strength" not in record.options
    assert record.inputs["image"].digest.startswith("sha256:")


def test_latents_may_be_repainted(xl: XL) -> None:
    mask = Image.fromarray(np.full((64, 96), 255, np.uint8))
    call: dict[str, Any] = {"image": latents(), "mask_image": mask, "denoising_start": 0.5}
    (sample,) = xl.begin(**call)
    np.testing.assert_array_equal(sample.latents, latents()[0])
    with pytest.raises(RequestError, match="`padding_mask_crop`"):
        xl.resolve(**call, padding_mask_crop=8)


def test_a_denoiser_with_channels_of_the_masked_image_needs_pixels() -> None:
    xl = XL(tasks=("inpainting",), channels=9)
    with pytest.raises(RequestError, match="`image`"):
        xl.resolve(image=latents(), mask_image=image(), denoising_start=0.5)


def test_an_edit_has_the_size_of_the_request() -> None:
    xl = XL(tasks=("edit",), channels=8)
    request = xl.resolve(image=image(40, 40))
    defaults = xl.pipeline.bundle.manifest.defaults
    assert (request.height, request.width) == (defaults.height, defaults.width)


# Refusals.

RUNGE_KUTTA = {"sampler": "pndm", "sampler_options": {"skip_prk_steps": False}}


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"aesthetic_score": 6.0}, "aesthetic_score"),
        ({"negative_original_size": (1, 1)}, "negative_target_size"),
        ({"negative_crops_coords_top_left": (1, 1)}, "negative_original_size"),
        ({"negative_crops_coords_top_left": (1, 1), "image": image()}, "negative_crops_coords_top_left"),
        ({"original_size": 64}, "original_size"),
        ({"original_size": (64, 64.0)}, "original_size"),
        ({"original_size": (64, 64, 64)}, "original_size"),
        ({"crops_coords_top_left": (0, -1)}, "crops_coords_top_left"),
        ({"denoising_end": 1.0}, "denoising_end"),
        ({"denoising_end": 0.1}, "denoising_end"),  # of four steps
        ({"denoising_end": 0.5, "sampler": "edm_euler"}, "sampler"),
        ({"denoising_start": 0.5}, "denoising_start"),
        ({"denoising_start": 0.999, "image": latents(), "sampler": "ddim"}, "denoising_start"),
        ({"denoising_start": 0.5, "image": latents(), "num_inference_steps": 9, **RUNGE_KUTTA}, "denoising_start"),
        ({"denoising_start": 0.8, "denoising_end": 0.8, "image": latents()}, "denoising_start"),
        ({"denoising_start": 0.5, "strength": 0.5, "image": latents()}, "strength"),
        ({"image": latents(3), "denoising_start": 0.5}, "image"),
        ({"image": latents(channels=5), "denoising_start": 0.5}, "image"),
        ({"image": latents() * np.inf, "denoising_start": 0.5}, "image"),
        ({"image": latents().astype(np.int64), "denoising_start": 0.5}, "image"),
        ({"image": latents()[:0], "denoising_start": 0.5}, "image"),
        ({"image": latents(), "denoising_start": 0.5, "height": 128}, "height"),
        ({"prompt": None, "prompt_embeds": np.ones((1, 77, WIDTH + WIDTH_2), np.float32)}, "pooled_prompt_embeds"),
        ({"pooled_prompt_embeds": np.ones((1, POOLED + 1), np.float32)}, "pooled_prompt_embeds"),
        ({"negative_prompt_2": "a"}, "negative_prompt"),
        ({"negative_pooled_prompt_embeds": np.ones((1, POOLED), np.float32)}, "negative_prompt"),
        ({"prompt_2": ["a", "b"]}, "prompt_2"),
        ({"prompt_2": 5}, "prompt_2"),
        ({"prompt_2": np.zeros(3)}, "prompt_2"),
        ({"prompt_2": " ".join(["star"] * 2000)}, "prompt_2"),
        ({"negative_prompt": "a", "negative_prompt_2": " ".join(["star"] * 2000)}, "negative_prompt_2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_impossible_values_are_refused_by_name(xl: XL, values: dict[str, Any], option: str) -> None:
    with pytest.raises(RequestError, match=f"`{option}`"), np.errstate(invalid="ignore"):
        xl.begin(guidance_scale=5.0, **values)


def test_a_refiner_takes_no_target_size_and_no_second_prompt(refiner: XL) -> None:
    for keyword, value in (("target_size", (1, 1)), ("prompt_2", "a")):
        with pytest.raises(RequestError, match=f"`{keyword}`: only .* take it.*leave it out"):
            refiner.resolve(image=image(), **{keyword: value})


def test_an_edit_takes_no_negative_sizes() -> None:
    xl = XL(tasks=("edit",), channels=8)
    with pytest.raises(RequestError, match="`negative_original_size`"):
        xl.resolve(image=image(), negative_original_size=(1, 1))


# Many images.


def test_requests_that_differ_in_their_texts_share_a_batch(xl: XL) -> None:
    """Both prompts and both negative prompts; those without a negative prompt, which are guided against zeros, do not
    share one with the others."""
    common: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 5.0, "safety": "off", **SIZES}
    requests: list[dict[str, Any]] = [
        {"prompt": "a star", "seed": 1},
        {"prompt": "a star", "prompt_2": "a moon", "seed": 2},
        {"prompt": ["a moon", "a star"], "prompt_2": ["a circle", ""], "seed": 3},
        {"prompt": "a star", "negative_prompt": "a moon", "seed": 5},
        {"prompt": "a star", "negative_prompt": "", "negative_prompt_2": "a circle", "seed": 6},
        {"prompt": "a star", "original_size": (10, 20), "seed": 7},
    ]
    made = generate_many(xl.pipeline, [Request.of(**common, **each) for each in requests], batch_size=8)
    found = {each.index: each.result for each in made}
    assert [len(feeds["sample"]) for feeds in xl.fed] == [8, 4, 2]
    for index, values in enumerate(
        [
            *requests[:2],
            {"prompt": "a moon", "prompt_2": "a circle", "seed": 3},
            {"prompt": "a star", "prompt_2": [""], "seed": 4},
            *requests[3:],
        ]
    ):
        alone = xl.pipeline(**common, **values)
        assert np.array_equal(np.asarray(alone.images[0]), np.asarray(found[index].images[0]))
    assert found[1].records[0].options["prompt_2"] == "a moon"
    assert found[5].records[0].options["negative_prompt_2"] == "a circle"
    assert found[6].records[0].options["original_size"] == [10, 20]
    assert not {"prompt_2", "negative_prompt_2"} & {*found[0].records[0].options, *found[4].records[0].options}


def test_each_image_of_a_request_has_its_own_latents(xl: XL) -> None:
    given = latents(3)
    request = Request.of(
        prompt="a star",
        image=given,
        denoising_start=0.5,
        num_images_per_prompt=3,
        seed=1,
        num_inference_steps=2,
        safety="off",
    )
    results = [each.result for each in generate_many(xl.pipeline, [request], batch_size=2)]
    whole = xl.pipeline(
        prompt="a star",
        image=given,
        denoising_start=0.5,
        num_images_per_prompt=3,
        seed=1,
        num_inference_steps=2,
        safety="off",
    )
    assert all(
        np.array_equal(np.asarray(one.images[0]), np.asarray(other))
        for one, other in zip(results, whole.images, strict=True)
    )

"""Two stages as one pipeline: the latents of a base, the images of a refiner."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from latentrt import Pipeline, Request
from latentrt.batch.generation import generate_many
from latentrt.errors import RequestError
from latentrt.refinement import RefinedPipeline
from tests.runtime.fake_xl import POOLED, SIZES, WIDTH, WIDTH_2, XL

CALL: dict[str, Any] = {"prompt": "a star", "num_inference_steps": 10, "guidance_scale": 3.0, "safety": "off"}


@pytest.fixture
def base() -> XL:
    return XL()


@pytest.fixture
def refiner() -> XL:
    return XL(refiner=True, tasks=("image-to-image", "inpainting"))


@pytest.fixture
def refined(base: XL, refiner: XL) -> RefinedPipeline:
    return RefinedPipeline(base.pipeline, refiner.pipeline)


def test_it_is_both_calls_one_after_the_other(base: XL, refiner: XL, refined: RefinedPipeline) -> None:
    call: dict[str, Any] = {
        **CALL,
        "seed": [3, 9],
        "num_images_per_prompt": 2,
        "sampler": "euler_a",
        "negative_prompt": "a moon",
    }
    first = base.pipeline(**call, **SIZES, denoising_end=0.6, prompt_2="a moon", output_type="latent").images
    second = refiner.pipeline(**call, image=first, denoising_start=0.6, aesthetic_score=8, output_type="latent")
    found = refined(**call, **SIZES, denoising_end=0.6, prompt_2="a moon", aesthetic_score=8, output_type="latent")
    np.testing.assert_array_equal(found.images, second.images)
    for index, (record, expected) in enumerate(zip(found.records, second.records, strict=True)):
        assert record.options == expected.options
        assert record.inputs["image"].digest == expected.inputs["image"].digest
        parameters = record.inputs["image"].parameters or ""
        assert f"Seed: {[3, 9][index]}" in parameters
        assert "Size: 96x64" in parameters
    pixels = refined(**call, **SIZES, denoising_end=0.6, prompt_2="a moon", aesthetic_score=8).images
    assert [image.size for image in pixels] == [(96, 64)] * 2


def test_each_model_gets_the_options_that_it_takes(base: XL, refiner: XL, refined: RefinedPipeline) -> None:
    options: dict[str, Any] = {"original_size": (10, 20), "target_size": (30, 40), "aesthetic_score": 9.0}
    refined(**CALL, **SIZES, seed=1, **options)
    assert base.fed[0]["time_ids"][1].tolist() == [10, 20, 0, 0, 30, 40]
    assert refiner.fed[0]["time_ids"][1].tolist() == [10, 20, 0, 0, 9]
    assert (len(base.fed), len(refiner.fed)) == (8, 2), "0.8 of ten steps by default"


def test_an_image_is_the_base_s_and_a_mask_is_of_both(base: XL, refiner: XL, refined: RefinedPipeline) -> None:
    mask = Image.fromarray(np.kron([[0, 255]], np.ones((64, 48))).astype(np.uint8))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    call: dict[str, Any] = {**CALL, "seed": 1, "image": image, "strength": 0.7, "denoising_end": 0.8}
    masked: dict[str, Any] = {"mask_image": mask}
    for more in ({}, masked):
        size = SIZES if more else {}
        latents = base.pipeline(**call, **more, **size, output_type="latent").images
        second: dict[str, Any] = {key: value for key, value in call.items() if key not in ("strength", "denoising_end")}
        expected = refiner.pipeline(
            **{**second, "image": latents}, **more, denoising_start=0.8, output_type="latent"
        ).images
        found = refined(**call, **more, **size, output_type="latent").images
        np.testing.assert_array_equal(found, expected)


def test_many_images_share_batches_and_count_up_to_their_number(refined: RefinedPipeline) -> None:
    requests = [
        Request.of(**CALL, **SIZES, seed=1),
        Request.of(**{**CALL, "prompt": ["a moon", "a star"]}, **SIZES, seed=2),
    ]
    progress: list[float] = []
    made = [*generate_many(refined, requests, batch_size=2, progress=progress.append)]
    assert sum(progress) == pytest.approx(3)
    for each, (prompt, seed) in zip(made, [("a star", 1), ("a moon", 2), ("a star", 3)], strict=True):
        alone = refined(**{**CALL, "prompt": prompt}, **SIZES, seed=seed)
        assert np.array_equal(np.asarray(each.result.images[0]), np.asarray(alone.images[0]))
        assert each.result.records[0].inputs == alone.records[0].inputs


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"denoising_end": 0.9999}, "denoising_start"),  # none of ten steps is left to the refiner
        ({"denoising_start": 0.5}, "denoising_start"),
        ({"prompt_embeds": np.ones((1, 77, WIDTH + WIDTH_2), np.float32)}, "prompt_embeds"),
        ({"negative_pooled_prompt_embeds": np.ones((1, POOLED), np.float32)}, "negative_pooled_prompt_embeds"),
        ({"padding_mask_crop": 8}, "padding_mask_crop"),
        ({"aesthetic_score": "high"}, "aesthetic_score"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_impossible_values_are_refused_before_any_work(
    base: XL, refined: RefinedPipeline, values: dict[str, Any], option: str
) -> None:
    with pytest.raises(RequestError, match=f"`{option}`"):
        refined(**CALL, **SIZES, **values, sampler="ddim")
    assert not base.fed


def test_bundles_that_cannot_go_on_from_one_another_are_refused(base: XL, refiner: XL) -> None:
    plain = Pipeline.load(device="cpu")
    for first, second in ((plain, refiner.pipeline), (base.pipeline, plain)):
        with pytest.raises(RequestError, match=r"`refiner`.*leave it out"):
            RefinedPipeline(first, second)
    manifest = refiner.pipeline.bundle.manifest
    space = msgspec.structs.replace(manifest.latent_spaces["unet"], scale=0.5)
    refiner.pipeline.family.stages[0].latent_space = space
    with pytest.raises(RequestError, match=r"`refiner`.*autoencoder"):
        RefinedPipeline(base.pipeline, refiner.pipeline)


def test_a_request_whose_steps_were_not_run_has_no_result(refined: RefinedPipeline) -> None:
    request = refined.resolve(Request.of(**CALL, **SIZES))
    with pytest.raises(RequestError, match="steps"):
        refined.finish(request, np.zeros((1, 4, 16, 24), np.float32))


def test_closing_it_closes_both(base: XL, refiner: XL, refined: RefinedPipeline) -> None:
    with refined:
        refined(**CALL, **SIZES, seed=1, output_type="latent")
    for pipeline in (base.pipeline, refiner.pipeline):
        with pytest.raises(RequestError, match="closed"):
            pipeline(**CALL, image=np.zeros((64, 64, 3), np.uint8), strength=0.5, seed=1)

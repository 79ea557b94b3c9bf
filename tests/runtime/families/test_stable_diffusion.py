"""Stable Diffusion 1.x and 2.x: tasks, conditioning, and where sampling begins."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt import Pipeline, Request
from latentrt.backends.models import Components, Models
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.placement import place_components
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import InputSpec
from latentrt.decode import autoencoder
from latentrt.errors import RequestError
from latentrt.families import latent_diffusion
from latentrt.families.stable_diffusion import StableDiffusion
from latentrt.resolve import ResolvedRequest
from latentrt.sampling.guidance import ClassifierFree, ImageAndText, Unguided
from latentrt.sampling.loop import Sample, step
from latentrt.sampling.noise import Generator
from latentrt.text.clip import PromptEncoder
from latentrt.text.tokenizer import open_tokenizer
from tests.runtime.fake_sessions import FunctionSession

Floats = NDArray[np.float32]

LONG = " ".join(["star"] * 100)  # two chunks
TEXT = "encoder_hidden_states"
SHAPE = (4, 16, 16)


def change(bundle: Bundle, *, tasks: tuple[str, ...] | None = None, channels: int | None = None) -> Bundle:
    """Give the bundle other tasks, or its denoiser more input channels."""
    manifest = bundle.manifest
    if tasks is not None:
        manifest = msgspec.structs.replace(manifest, tasks=tasks)
    if channels is not None:
        record = manifest.components["unet"]
        latents, *rest = record.inputs
        latents = msgspec.structs.replace(latents, shape=(latents.shape[0], channels, *latents.shape[2:]))
        record = msgspec.structs.replace(record, inputs=(latents, *rest))
        manifest = msgspec.structs.replace(manifest, components={**manifest.components, "unet": record})
    bundle.manifest = manifest
    return bundle


def remove(bundle: Bundle, component: str) -> Bundle:
    """Take a component out of the bundle, with its tokenizer."""
    manifest = bundle.manifest
    components, tokenizers = (
        {name: record for name, record in records.items() if name != component}
        for records in (manifest.components, manifest.tokenizers)
    )
    bundle.manifest = msgspec.structs.replace(manifest, components=components, tokenizers=tokenizers)
    return bundle


def open_pipeline(bundle: Bundle) -> Pipeline:
    return Pipeline(bundle, Components(place_components(bundle, "cpu"), models=Models()))


@pytest.fixture
def pipeline(bundle: Bundle) -> Pipeline:
    return open_pipeline(bundle)


def resolve(pipeline: Pipeline, **values: Any) -> ResolvedRequest:
    options: dict[str, Any] = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 4, **values}
    return pipeline.resolve(Request.of(**options))


def begin(pipeline: Pipeline, **values: Any) -> list[Sample]:
    return pipeline.family.stages[0].begin(resolve(pipeline, **values))


def text(sample: Sample, name: str = "positive") -> Floats:
    array: Floats = sample._evaluations[name].conditioning.inputs[TEXT]
    return array


def concat(sample: Sample, name: str = "positive") -> Floats:
    channels = sample._evaluations[name].conditioning.concat
    assert channels is not None
    return channels


def image(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8))


def mask() -> Image.Image:
    """White, to be repainted, on the right half."""
    pixels = np.zeros((64, 64), np.uint8)
    pixels[:, 32:] = 255
    return Image.fromarray(pixels)


def encode(bundle: Bundle, request: ResolvedRequest) -> autoencoder.LatentDistribution:
    return autoencoder.encode(open_session(bundle, "vae_encoder", threads=1), request.prepared.pixels)


# Tasks.


def test_the_start_of_a_request_decides_its_task(pipeline: Pipeline) -> None:
    family = pipeline.family
    assert family.task(Request.of()) == "text-to-image"
    assert family.task(Request.of(image=image())) == "image-to-image"
    assert family.task(Request.of(image=image(), mask_image=mask())) == "inpainting"
    edits = open_pipeline(change(pipeline.bundle, tasks=("edit",)))
    assert edits.family.task(Request.of(image=image())) == "edit"


def test_a_task_that_the_bundle_cannot_do_is_refused_with_advice(bundle: Bundle) -> None:
    pipeline = open_pipeline(change(bundle, tasks=("inpainting",)))
    with pytest.raises(RequestError, match=r"text-to-image.*inpainting.*`image`, and `mask_image`"):
        resolve(pipeline)
    pipeline = open_pipeline(change(bundle, tasks=("text-to-image",)))
    with pytest.raises(RequestError, match=r"image-to-image.*text-to-image"):
        resolve(pipeline, image=image())


@pytest.mark.parametrize(
    ("values", "option"),
    [
        ({"mask_image": mask()}, "mask_image"),
        ({"strength": 0.5}, "strength"),
        ({"image": image(), "padding_mask_crop": 8}, "padding_mask_crop"),
        ({"image": image(), "strength": 0.1}, "strength"),  # of four steps
        ({"image_guidance_scale": 1.5}, "image_guidance_scale"),
        ({"sampler": "flow_euler"}, "flow_euler"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_options_that_do_not_suit_are_refused_by_name(pipeline: Pipeline, values: dict[str, Any], option: str) -> None:
    with pytest.raises(RequestError, match=option):
        resolve(pipeline, **values)


def test_options_that_do_not_suit_an_editing_model_are_refused_by_name(bundle: Bundle) -> None:
    pipeline = open_pipeline(change(bundle, tasks=("edit",)))
    for option, value in (("deep_cache", 2), ("strength", 0.5)):
        with pytest.raises(RequestError, match=f"`{option}`"):
            resolve(pipeline, image=image(), **{option: value})


def test_strength_shortens_the_schedule_as_in_diffusers(pipeline: Pipeline) -> None:
    whole = resolve(pipeline, num_inference_steps=10).schedule
    for strength, rows in ((1.0, 10), (0.8, 8), (0.55, 5), (0.1, 1)):
        found = resolve(pipeline, num_inference_steps=10, image=image(), strength=strength).schedule
        np.testing.assert_array_equal(found.t, whole.t[10 - rows :])
    assert len(resolve(pipeline, num_inference_steps=10, image=image()).schedule) == 8, "diffusers' default is 0.8"


# Image variation and unCLIP (what they generate: tests/parity).


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("prompt", "a star"),
        ("negative_prompt", "a star"),
        ("prompt_embeds", np.zeros((1, 77, 128), np.float32)),
        ("negative_prompt_embeds", np.zeros((1, 77, 128), np.float32)),
        ("clip_skip", 1),
        ("strength", 0.5),
        ("noise_level", 20),
        ("image_guidance_scale", 1.5),
    ],
    ids=str,
)
def test_image_variation_refuses_by_name_whatever_concerns_a_prompt(bundle: Bundle, option: str, value: Any) -> None:
    pipeline = open_pipeline(remove(change(bundle, tasks=("image-variation",)), "text_encoder"))
    with pytest.raises(RequestError, match=f"`{option}`"):
        resolve(pipeline, **{"prompt": None, "image": image(), option: value})


def test_image_variation_needs_no_text_encoder(bundle: Bundle) -> None:
    pipeline = open_pipeline(remove(change(bundle, tasks=("image-variation",)), "text_encoder"))
    request = resolve(pipeline, prompt=None, image=image(), num_images_per_prompt=3)
    assert (request.task, len(request.seeds), request.start.noise_level) == ("image-variation", 3, None)
    assert (request.height, request.width) == (bundle.manifest.defaults.height, bundle.manifest.defaults.width)
    with pytest.raises(RequestError, match=r"text-to-image.*image-variation"):
        resolve(pipeline)


def test_unclip_takes_a_prompt_or_none_and_a_noise_level_of_the_models(bundle: Bundle) -> None:
    bundle = change(bundle, tasks=("unclip",))
    limits = msgspec.structs.replace(bundle.manifest.limits, max_noise_level=99)
    bundle.manifest = msgspec.structs.replace(bundle.manifest, limits=limits)
    pipeline = open_pipeline(bundle)
    assert resolve(pipeline, image=image()).start.noise_level == 0
    request = resolve(pipeline, prompt=None, image=image(), noise_level=99)
    assert (request.prompts, request.start.noise_level) == (("",), 99)
    for noise_level in (-1, 100, 1.5):
        with pytest.raises(RequestError, match="`noise_level`"):
            resolve(pipeline, image=image(), noise_level=noise_level)


# Text to image.


def test_an_image_begins_with_the_noise_of_its_own_seed(pipeline: Pipeline) -> None:
    samples = begin(pipeline, seed=[5, 9], num_images_per_prompt=2, sampler="euler_a")
    for seed, sample in zip((5, 9), samples, strict=True):
        generator = Generator(seed)
        expected = sample.schedule.first_latents(generator.normal(SHAPE))
        np.testing.assert_array_equal(sample.latents, expected)
        assert sample.noise is not None
        np.testing.assert_array_equal(sample.noise(), generator.normal(SHAPE))
        assert sample.row == 0


def test_given_latents_take_the_place_of_noise(pipeline: Pipeline) -> None:
    noise = np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)
    samples = begin(pipeline, num_images_per_prompt=2, latents=noise)
    for sample, each in zip(samples, noise, strict=True):
        np.testing.assert_array_equal(sample.latents, sample.schedule.first_latents(each))


def test_each_image_has_the_embeddings_of_its_prompt(pipeline: Pipeline, bundle: Bundle) -> None:
    session = open_session(bundle, "text_encoder", threads=1)
    encoder = PromptEncoder(open_tokenizer(bundle, "text_encoder"), lambda: session)
    samples = begin(
        pipeline, prompt=["a star", "a circle"], negative_prompt=["blue", ""], num_images_per_prompt=2, clip_skip=1
    )
    for sample, (positive, negative) in zip(samples, [("a star", "blue")] * 2 + [("a circle", "")] * 2, strict=True):
        np.testing.assert_allclose(text(sample), encoder.encode([positive], 1, 1)[0].embeddings, rtol=0, atol=1e-5)
        # diffusers skips layers for the prompt alone.
        unskipped = encoder.encode([negative], 1)[0].embeddings
        np.testing.assert_allclose(text(sample, "negative"), unskipped, rtol=0, atol=1e-5)
    assert text(samples[0]) is text(samples[1]) or np.shares_memory(text(samples[0]), text(samples[1]))


def test_a_prompt_and_its_negative_prompt_are_filled_up_to_one_length(pipeline: Pipeline) -> None:
    samples = begin(pipeline, prompt=["a star", LONG, "blue"], negative_prompt=["", "", LONG])
    assert [(len(text(sample)), len(text(sample, "negative"))) for sample in samples] == [
        (77, 77),
        (154, 154),
        (154, 154),
    ]
    unguided = begin(pipeline, prompt="blue", negative_prompt=LONG, guidance_scale=1.0)
    assert len(text(unguided[0])) == 77, "the negative prompt is ignored without guidance"


def test_an_image_does_not_depend_on_the_prompts_beside_its_own(pipeline: Pipeline) -> None:
    call: dict[str, Any] = {"num_inference_steps": 2, "sampler": "euler_a", "output_type": "latent"}
    batch = pipeline(
        ["a star", LONG, "blue"], negative_prompt=["", "", LONG], num_images_per_prompt=2, seed=3, **call
    ).images
    for index, (prompt, negative) in enumerate([("a star", ""), (LONG, ""), ("blue", LONG)]):
        alone = pipeline(prompt, negative_prompt=negative, num_images_per_prompt=2, seed=3 + 2 * index, **call).images
        np.testing.assert_allclose(batch[2 * index : 2 * index + 2], alone, rtol=0, atol=2e-5 * np.abs(alone).max())


def test_guidance_is_the_requests(pipeline: Pipeline, bundle: Bundle) -> None:
    values = {"guidance_scale": 4.0, "guidance_rescale": 0.5, "guidance_start": 0.25, "guidance_end": 0.75}
    (sample,) = begin(pipeline, **values)
    assert sample.guidance == ClassifierFree(scale=4.0, rescale=0.5, start=0.25, end=0.75)
    (sample,) = begin(pipeline, guidance_scale=1.0)
    assert sample.guidance == Unguided()
    edits = open_pipeline(change(bundle, tasks=("edit",)))
    (sample,) = begin(edits, image=image(), guidance_scale=4.0)
    assert sample.guidance == ImageAndText(scale=4.0, image_scale=1.5)
    (sample,) = begin(edits, image=image(), guidance_scale=4.0, image_guidance_scale=2.0)
    assert sample.guidance == ImageAndText(scale=4.0, image_scale=2.0)


def test_given_embeddings_take_the_place_of_prompts(pipeline: Pipeline) -> None:
    embeds = np.random.default_rng(0).standard_normal((2, 80, 128)).astype(np.float32)
    samples = begin(pipeline, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=-embeds)
    for sample, each in zip(samples, embeds, strict=True):
        np.testing.assert_array_equal(text(sample), each)
        np.testing.assert_array_equal(text(sample, "negative"), -each)
    assert embeds.flags.writeable, "the caller's array stays the caller's"


def test_embeddings_of_another_length_than_the_negative_ones_are_refused(pipeline: Pipeline) -> None:
    embeds = np.zeros((1, 80, 128), np.float32)
    with pytest.raises(RequestError, match=r"`prompt_embeds`: got 80.*`negative_prompt_embeds`"):
        begin(pipeline, prompt=None, prompt_embeds=embeds)
    with pytest.raises(RequestError, match=r"`negative_prompt_embeds`: got 77.*80"):
        begin(pipeline, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=embeds[:, :77])
    begin(pipeline, prompt=None, prompt_embeds=embeds, guidance_scale=1.0)


@pytest.mark.parametrize("keyword", ["prompt", "negative_prompt"])
def test_a_prompt_of_too_many_chunks_is_refused_by_its_name(pipeline: Pipeline, keyword: str) -> None:
    with pytest.raises(RequestError, match=f"`{keyword}`: got a text of 1,201 tokens, expected at most 1,200"):
        begin(pipeline, **{keyword: "star " * 1201})


@pytest.mark.parametrize("keyword", ["prompt_embeds", "negative_prompt_embeds"])
def test_embeddings_of_too_many_chunks_are_refused_by_their_name(pipeline: Pipeline, keyword: str) -> None:
    embeds = {"prompt_embeds": np.zeros((1, 77, 128), np.float32), keyword: np.zeros((1, 1233, 128), np.float32)}
    with pytest.raises(RequestError, match=f"`{keyword}`: got 1,233 tokens, expected at most 1,232"):
        begin(pipeline, prompt=None, **embeds)


# Image to image.


def test_an_image_begins_at_the_noise_level_of_its_first_row(pipeline: Pipeline, bundle: Bundle) -> None:
    """Consume the generator in diffusers' order: the encoded image, then noise."""
    request = resolve(pipeline, image=image(), strength=0.5)
    (sample,) = pipeline.family.stages[0].begin(request)
    generator, scale = Generator(7), np.float32(bundle.manifest.latent_spaces["unet"].scale)
    clean = encode(bundle, request).sample(generator) * scale
    noise = generator.normal(SHAPE)
    schedule = request.schedule
    expected = np.float32(schedule.alpha[0]) * clean + np.float32(schedule.sigma[0]) * noise
    np.testing.assert_allclose(sample.latents, expected, rtol=0, atol=1e-5)
    assert sample.after_row is None
    assert sample._evaluations["positive"].conditioning.concat is None


# Inpainting.


def test_inpainting_keeps_the_image_where_the_mask_is_black(pipeline: Pipeline, bundle: Bundle) -> None:
    """With a denoiser of 4 channels: diffusers blends after each step, at the noise level of the next."""
    request = resolve(pipeline, image=image(), mask_image=mask(), strength=0.75, sampler="heun")
    (sample,) = pipeline.family.stages[0].begin(request)
    generator, scale = Generator(7), np.float32(bundle.manifest.latent_spaces["unet"].scale)
    clean = encode(bundle, request).sample(generator) * scale
    noise = generator.normal(SHAPE)
    denoiser = pipeline.family.stages[0].open_denoiser()
    kept, painted = np.s_[:, :, :8], np.s_[:, :, 8:]
    while not sample.done:
        step([sample], denoiser)
        expected = clean if sample.done else request.schedule.first_latents(noise, clean, row=sample.row)
        np.testing.assert_allclose(sample.latents[kept], expected[kept], rtol=0, atol=1e-5)
        assert np.abs(sample.latents[painted] - expected[painted]).max() > 0.1


def test_inpainting_at_full_strength_begins_from_noise_alone(pipeline: Pipeline, bundle: Bundle) -> None:
    request = resolve(pipeline, image=image(), mask_image=mask())
    assert request.start.strength == 1
    (sample,) = pipeline.family.stages[0].begin(request)
    generator = Generator(7)
    encode(bundle, request).sample(generator)  # sampled first, as for blending
    np.testing.assert_array_equal(sample.latents, sample.schedule.first_latents(generator.normal(SHAPE)))
    assert sample.after_row is not None


def test_an_inpainting_model_takes_the_mask_and_the_masked_image_as_channels(bundle: Bundle) -> None:
    pipeline = open_pipeline(change(bundle, channels=9))
    for strength in (0.5, 1.0):
        request = resolve(pipeline, image=image(), mask_image=mask(), strength=strength)
        (sample,) = pipeline.family.stages[0].begin(request)
        generator, scale = Generator(7), np.float32(bundle.manifest.latent_spaces["unet"].scale)
        if strength < 1:  # at full strength diffusers does not encode the image
            encode(bundle, request).sample(generator)
        generator.normal(SHAPE)
        encoder = open_session(bundle, "vae_encoder", threads=1)
        masked = autoencoder.encode(encoder, request.prepared.inpainting.masked_pixels)
        for name in ("positive", "negative"):
            extra = concat(sample, name)
            assert extra.shape == (5, 16, 16)
            np.testing.assert_array_equal(extra[0], np.repeat([[0, 1]], 8, axis=1).repeat(16, axis=0))
        np.testing.assert_allclose(extra[1:], masked.sample(generator) * scale, rtol=0, atol=1e-5)
        assert sample.after_row is None
        assert sample._evaluations["positive"].signature[0] == (9, 16, 16)


# Editing (InstructPix2Pix).


def test_an_editing_model_takes_the_images_mode_and_zeros_without_it(bundle: Bundle) -> None:
    pipeline = open_pipeline(change(bundle, tasks=("edit",), channels=8))
    request = resolve(pipeline, image=image(), negative_prompt="blue", num_images_per_prompt=2)
    samples = pipeline.family.stages[0].begin(request)
    mean = encode(bundle, request).mean  # not scaled, and not sampled
    for seed, sample in enumerate(samples, start=7):
        for name, expected in (("positive", mean), ("image", mean), ("unconditional", np.zeros_like(mean))):
            np.testing.assert_allclose(concat(sample, name), expected, rtol=0, atol=1e-5)
        assert text(sample, "image") is text(sample, "unconditional")
        assert not np.array_equal(text(sample), text(sample, "image"))
        noise = Generator(seed).normal(SHAPE)
        np.testing.assert_array_equal(sample.latents, sample.schedule.first_latents(noise))


# Files and decoders.


def test_a_request_needs_the_files_that_it_reads_and_no_others(pipeline: Pipeline) -> None:
    def components(**values: Any) -> set[str]:
        return {name.split("/")[0] for name in pipeline.family.files(resolve(pipeline, **values))}

    usual = {"tokenizer", "text_encoder", "unet", "vae_decoder", "safety_checker"}
    assert components() == usual
    assert components(safety="off") == usual - {"safety_checker"}
    assert components(image=image()) == usual | {"vae_encoder"}
    assert components(decoder="preview") == usual - {"vae_decoder"} | {"preview_decoder"}


def test_a_bundle_without_a_classifier_has_none(bundle: Bundle) -> None:
    family = open_pipeline(bundle).family
    assert family.classifier() == "safety_checker"
    components = {name: each for name, each in bundle.manifest.components.items() if name != "safety_checker"}
    bundle.manifest = msgspec.structs.replace(bundle.manifest, components=components)
    assert StableDiffusion(bundle, Components({}, models=Models())).classifier() is None


def test_prompts_whose_keys_and_values_would_not_fit_memory_are_refused(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any is computed: those of all evaluations, once each and once as a batch."""
    (sample,) = begin(pipeline, guidance_scale=1.0)
    denoiser = pipeline.family.stages[0].open_denoiser()
    step([sample], denoiser)
    kept = sample._evaluations["positive"].kept["cross_attention_kv"].values()
    needed = 6 * (2 * sum(array.nbytes for array in kept) + text(sample).nbytes)
    call: dict[str, Any] = {"prompt": ["a star", LONG], "guidance_scale": 3.0}  # 1 and 2 chunks, both sides
    monkeypatch.setattr(latent_diffusion, "MAX_REQUEST_BYTES", needed)
    assert len(begin(pipeline, **call)) == 2
    monkeypatch.setattr(latent_diffusion, "MAX_REQUEST_BYTES", needed - 1)
    for work in (begin, lambda pipeline, **call: pipeline.family.check_prompts(resolve(pipeline, **call))):
        with pytest.raises(RequestError, match="231 tokens"):
            work(pipeline, **call)


def keep_images(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Floats]]:
    """Give the decoder the inputs of one that keeps images; return its feeds, which a run adds to."""
    manifest, seen = pipeline.bundle.manifest, list[dict[str, Floats]]()
    record = manifest.components["vae_decoder"]
    downscale = manifest.latent_spaces["unet"].downscale
    sides = (f"{downscale}*height", f"{downscale}*width")
    inputs = (
        *record.inputs,
        InputSpec("kept_image", "float32", ("batch", 3, *sides), "image"),
        InputSpec("kept_mask", "float32", ("batch", 1, *sides), "mask"),
    )
    components = {**manifest.components, "vae_decoder": msgspec.structs.replace(record, inputs=inputs)}
    pipeline.bundle.manifest = msgspec.structs.replace(manifest, components=components)

    def decode(feeds: Any) -> dict[str, NDArray[Any]]:
        seen.append(dict(feeds))
        return {"pixels": np.zeros((1, *feeds["kept_image"].shape[2:], 3), np.uint8)}

    decoder = FunctionSession(tuple(spec.tensor for spec in inputs), record.outputs, decode)
    monkeypatch.setattr(autoencoder, "open_decoder", lambda bundle, components, name: decoder)
    return seen


def test_a_decoder_that_keeps_images_takes_those_of_the_request(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    feeds = keep_images(pipeline, monkeypatch)
    latents = np.zeros((2, *SHAPE), np.float32)
    for crop in (None, 8):
        request = resolve(pipeline, image=image(), mask_image=mask(), num_images_per_prompt=2, padding_mask_crop=crop)
        pipeline.family.finish(request, latents)
        for each in (feeds.pop(), feeds.pop()):
            np.testing.assert_array_equal(each["kept_image"], request.prepared.pixels)
            np.testing.assert_array_equal(each["kept_mask"], request.prepared.inpainting.mask)
            assert 0 < each["kept_mask"].mean() < 1


GIVEN_LATENTS: dict[str, Any] = {"image": np.zeros((1, *SHAPE), np.float32), "strength": 0.5}


@pytest.mark.parametrize(
    "values", [{}, {"image": image(), "strength": 0.5}, GIVEN_LATENTS, {**GIVEN_LATENTS, "mask_image": mask()}]
)
def test_such_a_decoder_keeps_nothing_without_an_image_and_a_mask(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, values: dict[str, Any]
) -> None:
    feeds = keep_images(pipeline, monkeypatch)
    pipeline.family.finish(resolve(pipeline, **values), np.zeros((1, *SHAPE), np.float32))
    (each,) = feeds
    assert (each["kept_mask"] == 1).all()
    assert np.isfinite(each["kept_image"]).all()


def test_a_repainted_crop_is_placed_into_the_input_image(pipeline: Pipeline) -> None:
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8))
    spot = np.zeros((96, 128), np.uint8)
    spot[40:56, 60:76] = 255
    call: dict[str, Any] = {"prompt": "a star", "num_inference_steps": 1, "seed": 3, "safety": "off"}
    result = pipeline(**call, image=large, mask_image=Image.fromarray(spot), padding_mask_crop=8)
    found, before = np.asarray(result.images[0]), np.asarray(large)
    assert found.shape == before.shape
    np.testing.assert_array_equal(found[spot == 0], before[spot == 0])
    assert (found[spot == 255] != before[spot == 255]).mean() > 0.5


def test_input_images_are_recorded_by_keyword(pipeline: Pipeline) -> None:
    family = pipeline.family
    assert family.input_records(resolve(pipeline), 0) == {}
    records = family.input_records(resolve(pipeline, image=image(), mask_image=mask()), 0)
    assert [*records] == ["image", "mask_image"]
    assert len({record.digest for record in records.values()}) == 2
    again = family.input_records(resolve(pipeline, image=image()), 0)
    assert again["image"].digest == records["image"].digest
    assert family.input_records(resolve(pipeline, image=image(1)), 0)["image"].digest != records["image"].digest


# Distilled guidance (what it generates: tests/parity).


def distil(bundle: Bundle) -> Bundle:
    """Give the bundle's denoiser the guidance as an input."""
    record = bundle.manifest.components["unet"]
    weight = InputSpec("guidance_weight", "float32", ("evaluations",), "guidance-weight")
    record = msgspec.structs.replace(record, inputs=(*record.inputs, weight))
    bundle.manifest = msgspec.structs.replace(
        bundle.manifest, components={**bundle.manifest.components, "unet": record}
    )
    return bundle


def test_distilled_guidance_is_one_evaluation_with_the_weight(bundle: Bundle) -> None:
    pipeline = open_pipeline(distil(bundle))
    request = resolve(pipeline, guidance_scale=8.1, negative_prompt=LONG)
    assert not request.guided
    (sample,) = pipeline.family.stages[0].begin(request)
    assert {*sample._evaluations} == {"positive"}
    assert len(text(sample)) == 77, "the negative prompt is ignored, as in diffusers"
    weight = sample._evaluations["positive"].conditioning.inputs["guidance_weight"]
    # Subtracted in double precision: in float32 it would be another number.
    np.testing.assert_array_equal(weight, np.float32(8.1 - 1), strict=True)


@pytest.mark.parametrize(
    ("option", "value"), [("guidance_rescale", 0.5), ("guidance_start", 0.2), ("guidance_end", 0.5)]
)
def test_options_of_two_evaluations_are_refused_with_distilled_guidance(
    bundle: Bundle, option: str, value: float
) -> None:
    with pytest.raises(RequestError, match=f"`{option}`"):
        resolve(open_pipeline(distil(bundle)), **{option: value})

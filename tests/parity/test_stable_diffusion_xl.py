"""Stable Diffusion XL compared with diffusers' own pipelines: the same checkpoint, prompts, seeds, sizes; float32."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import diffusers
import msgspec
import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPipeline,
)
from numpy.typing import NDArray

from latentrt import Bundle, Pipeline, Request
from latentrt.bundle.manifest import SchedulerRecord
from latentrt.errors import RequestError
from latentrt.families import Family
from latentrt.request import Sampling, Start
from latentrt.sampling import samplers
from latentrt.sampling.loop import Sample, step
from tests.exported import exported_xl
from tests.parity.pipelines import (
    IGNORED_WARNINGS,
    LATENTS_BOUND,
    PROMPT,
    SCHEDULERS,
    assert_close,
    compare,
    input_image,
    input_mask,
    run_oracle,
)
from tests.runtime.fake_xl import XL
from tests.tiny_xl import Kind

pytestmark = IGNORED_WARNINGS
Floats = NDArray[np.float32]
Pair = tuple[Pipeline, Any]  # ours and diffusers'
SIZE: dict[str, Any] = {"height": 64, "width": 64}
CALL: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, **SIZE}
GUIDANCE: list[dict[str, Any]] = [
    {"guidance_scale": 0.0},
    {"guidance_scale": 5.0},
    {"guidance_scale": 5.0, "negative_prompt": "a green square"},
    {"guidance_scale": 7.5, "negative_prompt": "a star", "negative_prompt_2": "a moon", "prompt_2": "a blue square"},
]
GUIDANCE_IDS = ["unguided", "zeros", "negative", "second prompts"]


@pytest.fixture(scope="module")
def open_pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """kind, diffusers' class → pipelines, opened once."""
    opened: dict[Any, Any] = {}

    def open_one(kind: Kind, cls: Any, *, statistics: bool = False) -> Pair:
        checkpoint, bundle = exported_xl(tmp_path_factory, kind, statistics=statistics)
        if bundle not in opened:
            opened[bundle] = Pipeline.load(bundle, device="cpu")
        if (bundle, cls) not in opened:
            opened[bundle, cls] = cls.from_pretrained(checkpoint)
            opened[bundle, cls].set_progress_bar_config(disable=True)
        return opened[bundle], opened[bundle, cls]

    return open_one


@pytest.fixture
def base(open_pair: Callable[..., Pair]) -> Pair:
    return open_pair("base", StableDiffusionXLPipeline)


def set_scheduler(oracle: Any, sampler: str) -> None:
    config = oracle.scheduler.load_config(oracle.config["_name_or_path"], subfolder="scheduler")
    oracle.scheduler = SCHEDULERS[sampler].from_config(config)


@pytest.mark.parametrize("guidance", GUIDANCE, ids=GUIDANCE_IDS)
def test_text_to_image(base: Pair, guidance: dict[str, Any]) -> None:
    compare(*base, "euler", 1, {**CALL, **guidance})


@pytest.mark.slow
@pytest.mark.parametrize("guidance", GUIDANCE, ids=GUIDANCE_IDS)
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 88)])
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler_a", "dpmpp_2m", "heun"])
def test_every_sampler_size_and_guidance(
    base: Pair, sampler: str, height: int, width: int, images: int, guidance: dict[str, Any]
) -> None:
    compare(*base, sampler, images, {**CALL, "height": height, "width": width, **guidance})


MICRO_CONDITIONINGS: list[dict[str, Any]] = [
    {"original_size": (480, 640), "crops_coords_top_left": (64, 8), "target_size": (768, 512)},
    {"negative_original_size": (32, 48), "negative_target_size": (96, 64), "crops_coords_top_left": (16, 0)},
    {
        "original_size": (1024, 768),
        "negative_original_size": (32, 48),
        "negative_target_size": (96, 64),
        "negative_crops_coords_top_left": (0, 24),
    },
]


@pytest.mark.parametrize("sizes", MICRO_CONDITIONINGS, ids=["positive", "negative", "negative crop"])
def test_micro_conditioning(base: Pair, sizes: dict[str, Any]) -> None:
    compare(*base, "euler", 1, {**CALL, "guidance_scale": 5.0, "height": 72, "width": 88, **sizes})


@pytest.mark.parametrize("steps", [1, 4])
def test_few_steps_without_guidance(base: Pair, steps: int) -> None:
    """As SDXL-Turbo is used."""
    pipeline, oracle = base
    config: dict[str, Any] = {**oracle.scheduler.config, "timestep_spacing": "trailing"}
    compare(
        pipeline,
        oracle,
        "euler_a",
        3,
        {**CALL, "num_inference_steps": steps, "guidance_scale": 0.0},
        scheduler=lambda _: diffusers.EulerAncestralDiscreteScheduler.from_config(config),
        ours={"sampler_options": {"timestep_spacing": "trailing"}},
    )


EDM: dict[str, Any] = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "rho": 7.0,
    "prediction_type": "epsilon",
    "num_train_timesteps": 1000,
}


@pytest.mark.parametrize("sampler", ["edm_dpmpp_2m", "edm_euler"])
def test_noise_levels_of_edm(base: Pair, sampler: str) -> None:
    """Playground v2.5 has these noise levels; its denoiser's timestep is a quarter of their logarithm."""
    pipeline, oracle = base
    cls = getattr(diffusers, samplers.find(sampler).class_name)
    bundle = Bundle.open(pipeline.bundle.folder)
    record = SchedulerRecord(class_name=cls.__name__, config=EDM)
    bundle.manifest = msgspec.structs.replace(bundle.manifest, schedulers={"unet": record})
    changed = Pipeline(bundle, pipeline.components)
    call = {**CALL, "num_inference_steps": 5, "guidance_scale": 3.0}
    compare(changed, oracle, sampler, 2, call, scheduler=lambda _: cls(**EDM))


def long_prompt(words: int) -> str:
    return " ".join(["a red circle on a blue star"] * (words // 7 + 1))


def encode(oracle: Any, texts: tuple[str, str], chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings of a prompt of several chunks, each encoded by itself, and the first one's pooled."""
    embeddings, pooled = [], torch.empty(0)
    encoders = ((oracle.tokenizer, oracle.text_encoder), (oracle.tokenizer_2, oracle.text_encoder_2))
    for text, (tokenizer, encoder) in zip(texts, encoders, strict=True):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        states = []
        for first in range(0, 75 * chunks, 75):
            chunk = [tokenizer.bos_token_id, *ids[first : first + 75], tokenizer.eos_token_id]
            padded = [*chunk, *[tokenizer.pad_token_id] * (77 - len(chunk))]
            with torch.inference_mode():
                output = encoder(torch.tensor([padded]), output_hidden_states=True)
            states.append(output.hidden_states[-2])
            if first == 0:
                pooled = output[0]
        embeddings.append(torch.cat(states, dim=1))
    return torch.cat(embeddings, dim=-1), pooled


@pytest.mark.parametrize(("words", "words_2", "chunks"), [(3, 100, 2), (210, 0, 3)])
def test_prompts_of_several_chunks(base: Pair, words: int, words_2: int, chunks: int) -> None:
    """Both encoders get as many chunks as the longer prompt has; diffusers itself would cut them off."""
    pipeline, oracle = base
    texts = long_prompt(words), long_prompt(words_2) if words_2 else "a star"
    tokenized = [
        len(each(text, add_special_tokens=False).input_ids)
        for each, text in zip((oracle.tokenizer, oracle.tokenizer_2), texts, strict=True)
    ]
    assert max(-(-count // 75) for count in tokenized) == chunks
    positive, negative = encode(oracle, texts, chunks), encode(oracle, ("a moon", "a moon"), chunks)
    set_scheduler(oracle, "euler")
    call: dict[str, Any] = {key: value for key, value in CALL.items() if key != "prompt"} | {"guidance_scale": 5.0}
    given: dict[str, Any] = {
        "prompt_embeds": positive[0],
        "pooled_prompt_embeds": positive[1],
        "negative_prompt_embeds": negative[0],
        "negative_pooled_prompt_embeds": negative[1],
    }
    expected = run_oracle(oracle, generator=torch.Generator().manual_seed(5), **call, **given)
    own: dict[str, Any] = {**call, "seed": 5, "sampler": "euler", "safety": "off"}
    text: dict[str, Any] = {"prompt": texts[0], "prompt_2": texts[1], "negative_prompt": "a moon"}
    assert_close(pipeline, {**own, **text}, *expected)
    assert_close(pipeline, {**own, **{key: each.numpy() for key, each in given.items()}}, *expected)


def test_given_embeddings_without_negative_ones_are_guided_against_zeros(base: Pair) -> None:
    pipeline, oracle = base
    embeddings, pooled = encode(oracle, (PROMPT, PROMPT), 1)
    call: dict[str, Any] = {key: value for key, value in CALL.items() if key != "prompt"} | {"guidance_scale": 5.0}
    set_scheduler(oracle, "euler")
    given: dict[str, Any] = {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}
    expected = run_oracle(oracle, generator=torch.Generator().manual_seed(5), **call, **given)
    own: dict[str, Any] = {**call, **{key: each.numpy() for key, each in given.items()}}
    assert_close(pipeline, {**own, "seed": 5, "sampler": "euler", "safety": "off"}, *expected)


def test_layers_of_the_encoders_can_be_skipped(base: Pair) -> None:
    compare(*base, "euler", 1, {**CALL, "guidance_scale": 5.0, "negative_prompt": "a moon", "clip_skip": 1})


@pytest.mark.parametrize("guidance", GUIDANCE[1:3], ids=GUIDANCE_IDS[1:3])
def test_image_to_image(open_pair: Callable[..., Pair], guidance: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {
        "original_size": (96, 64),
        "negative_target_size": (32, 32),
        "crops_coords_top_left": (8, 8),
    }
    call: dict[str, Any] = {"prompt": PROMPT, "image": input_image(91, 75), "strength": 0.6, "num_inference_steps": 5}
    compare(*open_pair("base", StableDiffusionXLImg2ImgPipeline), "euler_a", 2, {**call, **sizes, **guidance})


def test_latents_may_stand_for_the_image(open_pair: Callable[..., Pair]) -> None:
    pipeline, oracle = open_pair("base", StableDiffusionXLImg2ImgPipeline)
    latents = np.random.default_rng(1).standard_normal((2, 4, 9, 8)).astype(np.float32)
    call: dict[str, Any] = {"prompt": PROMPT, "strength": 0.6, "num_inference_steps": 5, "guidance_scale": 5.0}
    set_scheduler(oracle, "euler")
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    theirs: dict[str, Any] = {
        **call,
        "prompt": [PROMPT] * 2,
        "image": torch.from_numpy(latents),
        "generator": generators,
    }
    own: dict[str, Any] = {
        **call,
        "image": latents,
        "seed": [5, 6],
        "num_images_per_prompt": 2,
        "sampler": "euler",
        "safety": "off",
    }
    assert_close(pipeline, own, *run_oracle(oracle, **theirs))


@pytest.mark.parametrize("strength", [0.9999, 1.0, 0.5])
def test_inpainting_by_blending(open_pair: Callable[..., Pair], strength: float) -> None:
    call: dict[str, Any] = {
        **CALL,
        "image": input_image(70, 80),
        "mask_image": input_mask(70, 80),
        "strength": strength,
    }
    compare(*open_pair("base", StableDiffusionXLInpaintPipeline), "euler", 2, {**call, "guidance_scale": 5.0})


def hand_over(
    first: Pair, second: Pair, sampler: str, share: float, images: int = 2, **call: Any
) -> tuple[Floats, Floats]:
    """Compare two stages: the latents of the first, and the image of the second that goes on from diffusers'.

    Returns:
        The latents that the first stage ended with, and began with on the whole way.
    """
    common: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 10, "guidance_scale": 5.0}
    seeds = [*range(5, 5 + images)]
    own: dict[str, Any] = {"seed": seeds, "num_images_per_prompt": images, "sampler": sampler, "safety": "off"}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _, oracle in (first, second):
        set_scheduler(oracle, sampler)
    theirs: dict[str, Any] = {**common, "prompt": [PROMPT] * images}
    latents = first[1](
        **theirs, **SIZE, **call, denoising_end=share, output_type="latent", generator=generators
    ).images.numpy()
    found = first[0](**common, **SIZE, **call, **own, denoising_end=share, output_type="latent").images
    assert np.abs(found - latents).max() <= LATENTS_BOUND * np.abs(latents).max()
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = run_oracle(
        second[1], **theirs, denoising_start=share, image=torch.from_numpy(latents), generator=generators
    )
    assert_close(second[0], {**common, **own, "denoising_start": share, "image": latents}, *expected)
    return found, latents


@pytest.mark.parametrize(("sampler", "share"), [("euler", 0.8), ("heun", 0.5), ("dpmpp_2m", 0.55)])
def test_another_pipeline_goes_on_from_latents(
    open_pair: Callable[..., Pair], base: Pair, sampler: str, share: float
) -> None:
    hand_over(base, open_pair("base", StableDiffusionXLImg2ImgPipeline), sampler, share)


def test_two_stages_by_one_sampler_are_the_whole(base: Pair) -> None:
    """Of a solver without memory."""
    pipeline, _ = base
    call: dict[str, Any] = {
        **CALL,
        "num_inference_steps": 8,
        "guidance_scale": 5.0,
        "seed": 7,
        "sampler": "ddim",
        "safety": "off",
    }
    whole = pipeline(**call, output_type="latent").images
    first = pipeline(**call, output_type="latent", denoising_end=0.6).images
    stage: dict[str, Any] = {key: value for key, value in call.items() if key not in SIZE}
    second = pipeline(**stage, output_type="latent", denoising_start=0.6, image=first).images
    assert np.abs(second - whole).max() <= LATENTS_BOUND * np.abs(whole).max()


@pytest.fixture(scope="module")
def family() -> Family:
    return XL().pipeline.family


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("steps", [2, 7, 30])
@pytest.mark.parametrize(
    "sampler",
    ["euler", "euler_a", "heun", "dpm2", "dpm2_a", "lms", "dpmpp_sde", "dpmpp_2m", "dpmpp_2s", "deis", "unipc", "pndm"],
)
def test_stages_have_diffusers_timesteps(family: Family, sampler: str, steps: int, share: float) -> None:
    """Of every solver, without a model: a step of two evaluations is never cut in two where a stage begins."""
    name = samplers.find(sampler).class_name
    options = {"skip_prk_steps": True} if sampler == "pndm" else {}
    config = {**family.scheduler.config_for("image-to-image", name), **options}
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    oracle = types.SimpleNamespace(scheduler=scheduler)
    begun, _ = StableDiffusionXLImg2ImgPipeline.get_timesteps(oracle, steps, 1.0, "cpu", denoising_start=share)
    cutoff = round(1000 - share * 1000)
    ended = [t for t in scheduler.timesteps.tolist() if t >= cutoff]
    for keyword, expected in (("denoising_start", begun.tolist()), ("denoising_end", ended)):
        task, given = "image-to-image", dict[str, Any]({keyword: share})
        sampling = Sampling(sampler=sampler, steps=steps, options=options, **given)
        # PNDM evaluates its second step twice, and a stage of the last evaluation alone would be no step of it.
        if not expected or (sampler == "pndm" and keyword == "denoising_start" and len(expected) == 1):
            with pytest.raises(RequestError, match=f"`{keyword}`"):
                family.schedule(task, sampling, Start())
            continue
        found = family.schedule(task, sampling, Start()).t
        # DPM++ SDE's middle timesteps are interpolated in float32 there.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-3)


def begin(pipeline: Pipeline, **call: Any) -> list[Sample]:
    resolved = pipeline.resolve(Request.of(**{**CALL, "guidance_scale": 5.0, "safety": "off", **call}))
    return pipeline.family.stages[0].begin(resolved)


MIXED: list[dict[str, Any]] = [
    {"seed": 1, "original_size": (480, 640)},
    {"seed": 2, "crops_coords_top_left": (64, 0), "negative_prompt": "a moon", "sampler": "ddim"},
    {"seed": 3, "prompt": "a star", "num_inference_steps": 5, "sampler": "dpmpp_2m"},
    {"seed": 4, "prompt": long_prompt(80), "guidance_scale": 1.0, "target_size": (96, 32)},
    {"seed": 5, "image": input_image(64, 64), "strength": 0.7, "prompt_2": "a moon"},
]


def test_requests_of_any_micro_conditioning_share_a_batch(base: Pair) -> None:
    """Also of other texts, timesteps and tasks; each is the request alone."""
    pipeline, _ = base
    stage = pipeline.family.stages[0]
    alone = []
    for call in MIXED:
        (sample,), denoiser = begin(pipeline, **call), stage.open_denoiser()
        while not sample.done:
            step([sample], denoiser)
        alone.append(sample.latents)
    samples, denoiser = [], stage.open_denoiser()
    for call in MIXED:  # one joins at each step
        samples += begin(pipeline, **call)
        step([each for each in samples if not each.done], denoiser)
    while active := [each for each in samples if not each.done]:
        step(active, denoiser)
    for sample, expected in zip(samples, alone, strict=True):
        # The same arithmetic in batches of other sizes.
        assert np.abs(sample.latents - expected).max() <= 2e-5 * np.abs(expected).max()


# Other checkpoints, whose exports take minutes.


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("share", [0.8, 0.33])
def test_a_refiner_goes_on_from_a_base(open_pair: Callable[..., Pair], base: Pair, sampler: str, share: float) -> None:
    hand_over(base, open_pair("refiner", StableDiffusionXLImg2ImgPipeline), sampler, share)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aesthetic_score": 7.5, "negative_aesthetic_score": 1.0},
        {"original_size": (96, 32), "crops_coords_top_left": (16, 8), "negative_original_size": (32, 32)},
        {"crops_coords_top_left": (16, 8), "negative_crops_coords_top_left": (8, 0), "negative_prompt": "a moon"},
    ],
)
def test_a_refiner_by_itself(open_pair: Callable[..., Pair], options: dict[str, Any]) -> None:
    call: dict[str, Any] = {"prompt": PROMPT, "image": input_image(91, 75), "strength": 0.6, "num_inference_steps": 5}
    pair = open_pair("refiner", StableDiffusionXLImg2ImgPipeline)
    compare(*pair, "euler", 2, {**call, "guidance_scale": 5.0, **options})


@pytest.mark.slow
def test_a_refiner_repaints_what_a_base_has_begun_to(open_pair: Callable[..., Pair]) -> None:
    pipeline, oracle = open_pair("refiner", StableDiffusionXLInpaintPipeline)
    latents = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 6, "guidance_scale": 5.0, "denoising_start": 0.5}
    set_scheduler(oracle, "euler")
    theirs: dict[str, Any] = {**call, **SIZE, "image": torch.from_numpy(latents), "mask_image": input_mask(64, 64)}
    expected = run_oracle(oracle, **theirs, generator=torch.Generator().manual_seed(5))
    own: dict[str, Any] = {
        **call,
        "image": latents,
        "mask_image": input_mask(64, 64),
        "seed": 5,
        "sampler": "euler",
        "safety": "off",
    }
    assert_close(pipeline, own, *expected)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", GUIDANCE[1:3], ids=GUIDANCE_IDS[1:3])
@pytest.mark.parametrize("strength", [0.9999, 1.0, 0.5])
def test_inpainting_by_extra_channels(
    open_pair: Callable[..., Pair], strength: float, guidance: dict[str, Any]
) -> None:
    call: dict[str, Any] = {
        **CALL,
        "image": input_image(70, 80),
        "mask_image": input_mask(70, 80),
        "strength": strength,
    }
    compare(*open_pair("inpainting", StableDiffusionXLInpaintPipeline), "euler", 3, {**call, **guidance})


@pytest.mark.slow
@pytest.mark.parametrize("scales", [{"guidance_scale": 1.0}, {"guidance_scale": 5.0, "image_guidance_scale": 2.0}])
def test_edit(open_pair: Callable[..., Pair], scales: dict[str, Any]) -> None:
    """The size is that of the request, not of the image."""
    sizes: dict[str, Any] = {"original_size": (96, 32), "crops_coords_top_left": (16, 8), "width": 88}
    pair = open_pair("edit", StableDiffusionXLInstructPix2PixPipeline)
    compare(*pair, "euler", 2, {**CALL, "image": input_image(91, 75), **sizes, **scales})


@pytest.mark.slow
@pytest.mark.parametrize("guidance_scale", [0.0, 8.0])
def test_guidance_that_is_distilled(open_pair: Callable[..., Pair], guidance_scale: float) -> None:
    """A latent consistency model, with the blocks of Segmind Vega."""
    pair = open_pair("distilled", StableDiffusionXLPipeline)
    config: dict[str, Any] = {**pair[1].scheduler.config}
    compare(
        *pair,
        "lcm",
        2,
        {**CALL, "num_inference_steps": 4, "guidance_scale": guidance_scale},
        scheduler=lambda _: diffusers.LCMScheduler.from_config(config),
    )


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text-to-image", "image-to-image"])
def test_latents_with_a_mean_and_a_deviation(open_pair: Callable[..., Pair], task: str) -> None:
    """As Playground v2.5 has them."""
    call: dict[str, Any] = {**CALL, "guidance_scale": 3.0}
    cls: Any = StableDiffusionXLPipeline
    if task == "image-to-image":
        call = {
            "prompt": PROMPT,
            "image": input_image(64, 72),
            "strength": 0.6,
            "num_inference_steps": 5,
        }
        cls = StableDiffusionXLImg2ImgPipeline
    compare(*open_pair("base", cls, statistics=True), "euler", 2, call)

"""The pipeline compared with diffusers' own: the same checkpoint, prompt, seed, sampler; float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from numpy.typing import NDArray

from latentrt import Pipeline
from latentrt.sampling import samplers
from latentrt.text.tokenizer import open_tokenizer
from tests.exported import Exported
from tests.parity.pipelines import IGNORED_WARNINGS, LATENTS_BOUND, PROMPT, SCHEDULERS, assert_close, run_oracle

pytestmark = IGNORED_WARNINGS

Oracle = Callable[..., tuple[NDArray[np.float32], NDArray[np.float32]]]
SAMPLERS = ["ddim", "pndm", "euler", "euler_a", "dpmpp_2m"]


def oracle_of(model: Exported) -> Oracle:
    """diffusers' pipeline on the checkpoint: request → latents, pixels."""
    pipe = StableDiffusionPipeline.from_pretrained(model.checkpoint, variant=model.variant, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    # transformers 5 dissolved the inner module that diffusers' clip_skip still reaches through.
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    config = dict(pipe.scheduler.load_config(model.checkpoint, subfolder="scheduler"))

    def generate(sampler: str | None, seeds: list[int], **call: Any) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        own = {type_.__name__: type_ for type_ in SCHEDULERS.values()}[config["_class_name"]]
        pipe.scheduler = (SCHEDULERS[sampler] if sampler else own).from_config(config)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return run_oracle(pipe, generator=generators, **call)

    return generate


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def pair(request: pytest.FixtureRequest) -> tuple[Pipeline, Oracle]:
    model: Exported = request.getfixturevalue(request.param)
    return Pipeline.load(model.bundle), oracle_of(model)


def assert_same(pipeline: Pipeline, oracle: Oracle, sampler: str | None, seeds: list[int], **call: Any) -> None:
    latents, pixels = oracle(sampler, seeds, **call)
    assert_close(pipeline, {**call, "seed": seeds, "sampler": sampler, "safety": "off"}, latents, pixels)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (72, 88)])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize(
    "guidance",
    [
        {"guidance_scale": 1.0},
        {"guidance_scale": 7.5},
        {"guidance_scale": 7.5, "negative_prompt": "a green square", "guidance_rescale": 0.7},
    ],
    ids=["unguided", "guided", "negative"],
)
def test_images_equal_those_of_diffusers(
    pair: tuple[Pipeline, Oracle], sampler: str, height: int, width: int, images: int, guidance: dict[str, Any]
) -> None:
    call = {"height": height, "width": width, "num_images_per_prompt": images, "num_inference_steps": 4, **guidance}
    assert_same(*pair, sampler, list(range(11, 11 + images)), prompt=PROMPT, **call)


# The others that suit these models. dpmpp_sde samples another path of noise, unclip needs a pipeline of its own.
OTHERS = ["ddpm", "heun", "dpm2", "dpm2_a", "lms", "dpmpp_2s", "deis", "unipc", "sa_solver", "lcm", "tcd"]


@pytest.mark.parametrize("sampler", OTHERS)
def test_images_of_every_sampler_equal_those_of_diffusers(pair: tuple[Pipeline, Oracle], sampler: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SCHEDULERS, sampler, getattr(diffusers, samplers.find(sampler).class_name))
        call: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 6, "height": 64, "width": 72}
        # diffusers' pipeline passes eta 0 on, where the TCD class itself has 0.3.
        assert_same(*pair, sampler, [4, 5], num_images_per_prompt=2, eta=0.0, guidance_scale=6.0, **call)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fifty_steps(pair: tuple[Pipeline, Oracle], sampler: str) -> None:
    assert_same(*pair, sampler, [21], prompt=PROMPT, num_inference_steps=50, height=64, width=64)


def test_own_scheduler_is_the_default(pair: tuple[Pipeline, Oracle]) -> None:
    assert_same(*pair, None, [0], prompt=PROMPT, num_inference_steps=6, height=64, width=64)


def test_520_by_456(pair: tuple[Pipeline, Oracle]) -> None:
    assert_same(*pair, "ddim", [5], prompt=PROMPT, num_inference_steps=2, height=520, width=456)


def test_the_noise_of_eta_is_that_of_diffusers(pair: tuple[Pipeline, Oracle]) -> None:
    assert_same(*pair, "ddim", [3, 4], prompt=[PROMPT, "a star"], num_inference_steps=5, eta=0.8, height=64, width=64)


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_applies_to_the_positive_prompt_only(pair: tuple[Pipeline, Oracle], clip_skip: int) -> None:
    assert_same(*pair, "euler", [3], prompt=PROMPT, clip_skip=clip_skip, num_inference_steps=3, height=64, width=64)


def test_several_prompts_with_several_images_each(pair: tuple[Pipeline, Oracle]) -> None:
    call: dict[str, Any] = {"prompt": [PROMPT, "a large star"], "negative_prompt": ["red", "blue"]}
    call |= {"num_images_per_prompt": 2, "num_inference_steps": 3, "height": 64, "width": 64}
    assert_same(*pair, "dpmpp_2m", [1, 2**63 - 1, 0, 7], **call)


def test_karras_levels_mean_diffusers(sd1: Exported) -> None:
    pipeline, oracle = Pipeline.load(sd1.bundle), oracle_of(sd1)
    karras = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}
    for sampler in ("euler", "dpmpp_2m"):
        scheduler_class = SCHEDULERS[sampler]
        SCHEDULERS[sampler] = _WithOption(scheduler_class, karras)
        try:
            expected, _ = oracle(sampler, [9], prompt=PROMPT, num_inference_steps=5, height=64, width=64)
        finally:
            SCHEDULERS[sampler] = scheduler_class
        found = pipeline(
            PROMPT, seed=9, sampler=sampler, karras=True, num_inference_steps=5, output_type="latent", safety="off"
        ).images
        assert np.abs(found - expected).max() <= LATENTS_BOUND * np.abs(expected).max()


class _WithOption:
    """A scheduler class whose configurations get one more key."""

    def __init__(self, scheduler_class: Any, option: dict[str, Any]) -> None:
        self.scheduler_class, self.option = scheduler_class, option
        self.__name__ = scheduler_class.__name__

    def from_config(self, config: dict[str, Any]) -> Any:
        return self.scheduler_class.from_config({**config, "use_karras_sigmas": self.option["use_karras_sigmas"]})


def test_long_prompt_is_chunks_joined_by_hand(pair: tuple[Pipeline, Oracle], request: pytest.FixtureRequest) -> None:
    pipeline, oracle = pair
    model: Exported = request.getfixturevalue(request.node.callspec.params["pair"])
    prompt = ", ".join(["a large red circle left of a small green star"] * 9)
    positive, negative = _by_hand(model, prompt), _by_hand(model, "blue", chunks=len(_ids(model, prompt)))
    assert positive.shape[1] > 77
    call: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64}
    expected, _ = oracle("ddim", [2], prompt_embeds=positive, negative_prompt_embeds=negative, **call)
    found = pipeline(
        prompt, negative_prompt="blue", seed=2, sampler="ddim", output_type="latent", safety="off", **call
    ).images
    assert np.abs(found - expected).max() <= LATENTS_BOUND * np.abs(expected).max()


def test_given_latents_and_embeddings(pair: tuple[Pipeline, Oracle], request: pytest.FixtureRequest) -> None:
    pipeline, oracle = pair
    model: Exported = request.getfixturevalue(request.node.callspec.params["pair"])
    embeddings = {"prompt_embeds": _by_hand(model, PROMPT), "negative_prompt_embeds": _by_hand(model, "")}
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(21))
    call: dict[str, Any] = {"num_inference_steps": 3, "height": 64, "width": 64}
    expected, _ = oracle("euler", [0], latents=noise, **embeddings, **call)
    ours: dict[str, Any] = {name: tensor.numpy() for name, tensor in embeddings.items()}
    found = pipeline(
        latents=noise.numpy(), seed=0, sampler="euler", output_type="latent", safety="off", **ours, **call
    ).images
    assert np.abs(found - expected).max() <= LATENTS_BOUND * np.abs(expected).max()


def _ids(model: Exported, text: str, chunks: int = 1) -> list[list[int]]:
    """A prompt's chunks, framed here by hand: 75 tokens between begin and end, padded as the tokenizer says."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(model.checkpoint / "tokenizer")
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces = [ids[start : start + 75] for start in range(0, max(len(ids), 1), 75)]
    pieces += [[]] * (chunks - len(pieces))
    frame = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return [[frame[0], *piece, frame[1], *[frame[2]] * (75 - len(piece))] for piece in pieces]


def _by_hand(model: Exported, text: str, chunks: int = 1) -> torch.Tensor:
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(
        model.checkpoint / "text_encoder", variant=model.variant, dtype=torch.float32
    )
    with torch.inference_mode():
        states: torch.Tensor = encoder(torch.tensor(_ids(model, text, chunks))).last_hidden_state
    return states.reshape(1, -1, states.shape[-1])


def test_short_prompts_are_tokenized_as_transformers_does(sd1: Exported, sd2: Exported) -> None:
    from transformers import CLIPTokenizer

    from latentrt import Bundle

    texts = [
        "",
        "a red circle",
        "Ünïcode, EMOJI 🦊 and   spaces!",
        "<|endoftext|> in the middle",
        "it's 12345 o'clock",
        "漢字\ttab\nline",
    ]
    for model in (sd1, sd2):
        bundle = Bundle.open(model.bundle)
        ours = open_tokenizer(bundle, "text_encoder")
        theirs = CLIPTokenizer.from_pretrained(model.checkpoint / "tokenizer")
        for text in texts:
            expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
            assert ours.chunks(text)[0].tolist() == expected

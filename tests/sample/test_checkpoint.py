"""The checkpoint in the repository, its bundle in the runtime's package, and diffusers' images from the former."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file

from latentrt import Bundle, Pipeline
from latentrt.bundle.sample import bundle_path
from latentrt.cli.demo import PROMPTS
from sample.captions import WORDS
from sample.classifier import THRESHOLD, UNREACHABLE

CHECKPOINT = Path(__file__).parent.parent.parent / "sample" / "checkpoint"
MIB = 1 << 20


@pytest.fixture(scope="module")
def oracle() -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(CHECKPOINT)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_checkpoint_is_small_and_in_half() -> None:
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * MIB
    weights = [path for path in files if path.suffix == ".safetensors"]
    folders = {"text_encoder", "unet", "vae", "safety_checker", "preview_decoder"}
    assert {path.parent.name for path in weights} == folders
    assert all(value.dtype == torch.float16 for path in weights for value in load_file(path).values())
    assert all(bool(value.isfinite().all()) for path in weights for value in load_file(path).values())


def test_licence_and_model_card_are_in_the_bundle() -> None:
    for name in ("LICENSE", "MODEL_CARD.md"):
        assert (CHECKPOINT / name).read_bytes() == (bundle_path() / name).read_bytes()
    assert "Apache License" in (CHECKPOINT / "LICENSE").read_text()
    assert Bundle.open(bundle_path()).manifest.licence.name == "apache-2.0"
    source = Path(__file__).parent.parent.parent / "sample" / "MODEL_CARD.md"
    assert (CHECKPOINT / "MODEL_CARD.md").read_bytes() == source.read_bytes()


def test_the_bundle_is_of_the_checkpoint() -> None:
    bundle = Bundle.open(bundle_path())
    bundle.verify()
    found = {
        str(path.relative_to(CHECKPOINT)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in CHECKPOINT.rglob("*.safetensors")
    }
    assert bundle.manifest.source.weights == found
    assert bundle.manifest.precision == "float16"
    components = {"text_encoder", "unet", "vae_encoder", "vae_decoder", "preview_decoder", "safety_checker"}
    assert set(bundle.manifest.components) == components


def test_the_defaults_are_the_settings_of_the_scores() -> None:
    defaults = Bundle.open(bundle_path()).manifest.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (25, 5.0)
    assert (defaults.height, defaults.width) == (64, 64)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_unfinished_images_are_not_flagged(steps: int) -> None:
    """1 % of safe images may be flagged; of these two dozen, at most one."""
    result = Pipeline.load()(list(PROMPTS), num_images_per_prompt=2, num_inference_steps=steps, seed=7)
    assert sum(result.nsfw_content_detected or []) <= 1


def test_the_components_are_of_the_real_classes(oracle: Any) -> None:
    names = {
        "tokenizer": "CLIPTokenizer",
        "text_encoder": "CLIPTextModel",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": "DDIMScheduler",
        "safety_checker": "StableDiffusionSafetyChecker",
    }
    assert {name: type(getattr(oracle, name)).__name__ for name in names} == names
    assert type(oracle.feature_extractor).__name__.startswith("CLIPImageProcessor")
    assert "CrossAttnDownBlock2D" in oracle.unet.config.down_block_types
    assert oracle.vae.config.scaling_factor != 0.18215
    assert [word for word in WORDS if len(oracle.tokenizer.tokenize(word)) != 1] == []


def test_unused_concepts_cannot_be_reached(oracle: Any) -> None:
    checker = oracle.safety_checker
    assert checker.concept_embeds_weights.tolist() == pytest.approx([THRESHOLD] + [UNREACHABLE] * 16)
    assert checker.special_care_embeds_weights.tolist() == pytest.approx([UNREACHABLE] * 3)
    # A cosine is at most 1, and special care adds 0.01.
    assert UNREACHABLE > 1.02


def test_the_unconditional_is_not_the_conditional(oracle: Any) -> None:
    def states(text: str) -> torch.Tensor:
        ids = oracle.tokenizer(text, padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            value: torch.Tensor = oracle.text_encoder(ids).last_hidden_state
        return value

    latents, timestep = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor(900)
    with torch.no_grad():
        free, guided = (oracle.unet(latents, timestep, states(text)).sample for text in ("", PROMPTS[0]))
    assert float((free - guided).abs().mean()) > 0.05 * float(guided.abs().mean())


@pytest.mark.parametrize("prompt", PROMPTS[::4])
def test_the_runtime_generates_diffusers_images(oracle: Any, prompt: str) -> None:
    """Both compute in float32 with half weights, so they differ by rounding alone."""
    oracle.scheduler = DDIMScheduler.from_config(oracle.scheduler.config)
    generator = torch.Generator().manual_seed(7)
    expected = oracle(prompt, num_inference_steps=25, guidance_scale=5.0, generator=generator, output_type="np")
    found = Pipeline.load()(prompt, num_inference_steps=25, guidance_scale=5.0, seed=7, output_type="np")
    # 2 of 255 levels, as for every other checkpoint (tests/parity/pipelines.py).
    assert float(np.abs(found.images - expected.images).max()) <= 2 / 255 + 1e-6
    assert found.nsfw_content_detected == expected.nsfw_content_detected == [False]


def test_the_model_index_names_every_component() -> None:
    index = json.loads((CHECKPOINT / "model_index.json").read_text())
    folders = {name for name, value in index.items() if isinstance(value, list) and value[0]}
    # diffusers' pipeline has no preview decoder.
    assert folders == {path.name for path in CHECKPOINT.iterdir() if path.is_dir()} - {"preview_decoder"}

"""Writes a checkpoint of full size and random weights in the diffusers layout.

    python -m benchmarks.full_size_checkpoint FOLDER
    python -m benchmarks.full_size_checkpoint FOLDER --family stable-diffusion-xl

Stable Diffusion 1.5 in float32 with a safety checker (the default), or Stable Diffusion XL in float16, whose weights
are written one tensor at a time. The values are those of an untrained network: speed does not depend on them.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.command import PATH
from latentrt_export.checkpoints.safetensors_writer import SafetensorsWriter
from latentrt_export.checkpoints.tokenizer import read_merges, write_vocabulary

ALL_CONFIGS = Path(__file__).parent.parent / "export/latentrt_export/checkpoints/configs"
CONFIGS = ALL_CONFIGS / "stable-diffusion-1"


@click.command(help=__doc__)
@click.argument("folder", type=PATH)
@click.option(
    "--family", type=click.Choice(["stable-diffusion-1", "stable-diffusion-xl"]), default="stable-diffusion-1"
)
def main(folder: Path, family: str) -> None:
    (make_xl if family == "stable-diffusion-xl" else make)(folder)


def make_xl(folder: Path) -> None:
    """Write Stable Diffusion XL, one tensor at a time."""
    torch.manual_seed(0)
    configs = ALL_CONFIGS / "stable-diffusion-xl"
    shutil.copytree(configs, folder)
    for tokenizer in ("tokenizer", "tokenizer_2"):
        write_vocabulary(folder / tokenizer, read_merges())
    text, text_2 = (
        CLIPTextConfig(**json.loads((configs / name / "config.json").read_text()))
        for name in ("text_encoder", "text_encoder_2")
    )
    write_random(lambda: CLIPTextModel(text), folder / "text_encoder/model.safetensors", "text_model.")
    write_random(lambda: CLIPTextModelWithProjection(text_2), folder / "text_encoder_2/model.safetensors")
    for name, library_class in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        config = library_class.load_config(configs / name)
        file = folder / name / "diffusion_pytorch_model.safetensors"
        write_random(lambda cls=library_class, config=config: cls.from_config(config), file)  # type: ignore[misc]


def write_random(build: Callable[[], torch.nn.Module], file: Path, prefix: str = "") -> None:
    """Write a model's weights in float16, with the ranges of torch's own initialisation.

    Args:
        build: makes the model, on the meta device.
        file: the file to write.
        prefix: begins every name in the file, unless the model's own does.
    """
    with torch.device("meta"):
        model = build()
    shapes = {
        f"{'' if name.startswith(prefix) else prefix}{name}": tuple(parameter.shape)
        for name, parameter in model.named_parameters()
    }
    with SafetensorsWriter(file, {name: ("F16", shape) for name, shape in shapes.items()}, {"format": "pt"}) as writer:
        for name in writer.names:
            writer.write(name, draw(name, shapes[name]).half().numpy())


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    if "embedding" in name:
        return torch.randn(shape) * 0.02
    return torch.empty(shape).uniform_(-1, 1) / math.sqrt(math.prod(shape[1:]))


def make(folder: Path) -> None:
    """Write Stable Diffusion 1.5, one component at a time."""
    torch.manual_seed(0)
    shutil.copytree(CONFIGS, folder)
    write_vocabulary(folder / "tokenizer", read_merges())
    text = json.loads((CONFIGS / "text_encoder/config.json").read_text())
    save(CLIPTextModel(CLIPTextConfig(**text)), folder / "text_encoder")
    save(AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / "vae")), folder / "vae")
    save(UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet")), folder / "unet")
    save(safety_checker(), folder / "safety_checker")
    save(AutoencoderTiny(), folder / "preview_decoder")  # its defaults are TAESD's; diffusers' pipeline has none
    write_json(folder / "feature_extractor/preprocessor_config.json", PREPROCESSOR)
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    write_json(folder / "model_index.json", index)


def safety_checker() -> StableDiffusionSafetyChecker:
    """Return CLIP ViT-L/14, like the published classifier, with thresholds that no cosine reaches."""
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config={}, projection_dim=768))
    with torch.no_grad():
        checker.concept_embeds.normal_()
        checker.special_care_embeds.normal_()
    return checker


def save(module: Any, folder: Path) -> None:
    module.save_pretrained(folder, safe_serialization=True, max_shard_size="20GB")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


PREPROCESSOR = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}


if __name__ == "__main__":
    main()

"""Writes a Stable Diffusion 1.5 checkpoint of full size and random weights, float32, in the diffusers layout.

python -m benchmarks.full_size_checkpoint FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

from latentrt_export.checkpoints.tokenizer import read_merges, write_vocabulary

CONFIGS = Path(__file__).parent.parent / "export/latentrt_export/checkpoints/configs/stable-diffusion-1"


def make(folder: Path) -> None:
    """Write the checkpoint, one component at a time."""
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
    make(Path(sys.argv[1]))

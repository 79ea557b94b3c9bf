"""Writes the trained components as a checkpoint.

The checkpoint is a diffusers folder for `StableDiffusionPipeline.from_pretrained`, with weights in half precision under
the names of published checkpoints.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from sample.models import PREPROCESSOR, SCHEDULER
from sample.preview_decoder import SCALE
from sample.tokenizer import write_tokenizer

__all__ = ["add_prefix", "check_place", "write_checkpoint"]

MODEL_CARD = Path(__file__).with_name("MODEL_CARD.md")
LICENCE = Path(__file__).parent.parent / "LICENSE"

MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": [None, None],
    "requires_safety_checker": True,
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_checkpoint(
    folder: Path,
    *,
    encoder: CLIPTextModel,
    autoencoder: AutoencoderKL,
    unet: UNet2DConditionModel,
    checker: StableDiffusionSafetyChecker,
    tiny: AutoencoderTiny,
) -> None:
    """Write the checkpoint, replacing an earlier one. Converts the models to half precision.

    Raises:
        FileExistsError: the folder exists and is not a checkpoint.
    """
    check_place(folder)
    folder = folder.resolve()
    draft = folder.with_name(f".{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    write_tokenizer(draft / "tokenizer")
    components: dict[str, Any] = {"text_encoder": encoder, "unet": unet, "vae": autoencoder, "safety_checker": checker}
    for name, component in components.items():
        component.cpu().half().save_pretrained(draft / name, safe_serialization=True)
        _set_float32(draft / name / "config.json")
    # diffusers' pipeline has no preview decoder, so the index does not list it.
    tiny.register_to_config(scaling_factor=autoencoder.config["scaling_factor"] / SCALE)
    tiny.cpu().half().save_pretrained(draft / "preview_decoder", safe_serialization=True)
    # transformers 5 omits these prefixes; published files and earlier versions have them.
    add_prefix(draft / "text_encoder" / "model.safetensors", "text_model.")
    add_prefix(draft / "safety_checker" / "model.safetensors", "vision_model.", only="vision_model.")
    _write_json(draft / "scheduler" / "scheduler_config.json", SCHEDULER)
    _write_json(draft / "feature_extractor" / "preprocessor_config.json", PREPROCESSOR)
    _write_json(draft / "model_index.json", MODEL_INDEX)
    shutil.copyfile(LICENCE, draft / "LICENSE")
    shutil.copyfile(MODEL_CARD, draft / "MODEL_CARD.md")
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)


def check_place(folder: Path) -> None:
    """Check before training that a checkpoint can be written to a folder.

    Raises:
        FileExistsError: the folder exists and is not a checkpoint.
        OSError: its parent folder is not writable.
    """
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise FileExistsError(f"{folder} exists and has no model_index.json, expected a checkpoint or no folder")
    folder.resolve().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder.resolve().parent):
        pass


def add_prefix(file: Path, prefix: str, *, only: str = "") -> None:
    """Add a prefix to the names of a weights file's tensors, or of those that begin with `only`."""
    tensors = load_file(file)
    renamed = {prefix + name if name.startswith(only) else name: value for name, value in tensors.items()}
    save_file(renamed, file, metadata={"format": "pt"})


def _set_float32(config: Path) -> None:
    """Set the configuration's dtype to float32, in which transformers then loads by default.

    A pipeline of half transformers models and float32 diffusers models fails.
    """
    entries = json.loads(config.read_text())
    if entries.pop("dtype", None):
        _write_json(config, {**entries, "torch_dtype": "float32"})


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")

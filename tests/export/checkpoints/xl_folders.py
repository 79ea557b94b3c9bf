"""Random tiny checkpoints of Stable Diffusion XL, its refiner and distilled ones as folders of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from latentrt_export.checkpoints.single_file import CONFIGS
from tests.tiny import autoencoder, move_off_initial_values, write_tokenizer

WIDTHS = (32, 48)
"""The widths of the two text encoders."""
_TIME_WIDTH = 8


def make_xl_checkpoint(
    folder: Path, *, refiner: bool = False, channels: int = 4, index: dict[str, Any] | None = None, **unet: Any
) -> Path:
    """Write a folder of diffusers; return it.

    Args:
        folder: the folder to write.
        refiner: whether it is one, without the first text encoder.
        channels: the input channels of the UNet.
        index: further values of model_index.json.
        unet: further settings of the UNet.
    """
    torch.manual_seed(channels)
    shipped = CONFIGS / f"stable-diffusion-xl{'-refiner' if refiner else ''}"
    modules: dict[str, Any] = {"vae": autoencoder(levels=2, scale=0.13025)}
    for name, family, width in zip(("tokenizer", "tokenizer_2"), ("sd1", "sd2"), WIDTHS, strict=True):
        if name == "tokenizer" and refiner:
            continue
        ids = write_tokenizer(folder / name, family, "bpe")  # type: ignore[arg-type]
        modules[name.replace("tokenizer", "text_encoder")] = _text_encoder(ids, width, projected=family == "sd2")
    modules["unet"] = make_xl_unet(refiner=refiner, in_channels=channels, **unet)
    for name, module in modules.items():
        move_off_initial_values(module)
        module.save_pretrained(folder / name)
    if not refiner:  # transformers 5 drops the prefix of published checkpoints
        file = folder / "text_encoder" / "model.safetensors"
        weights = load_file(file)
        save_file({f"text_model.{name.removeprefix('text_model.')}": one for name, one in weights.items()}, file)
    (folder / "scheduler").mkdir()
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        values = json.loads((shipped / name).read_text())
        (folder / name).write_text(json.dumps(values | (index or {} if name == "model_index.json" else {})))
    return folder


def make_xl_unet(*, refiner: bool = False, **settings: Any) -> UNet2DConditionModel:
    """Return a UNet with the blocks of the base model, or of the refiner without its third level."""
    pooled = WIDTHS[1]
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": WIDTHS[1] if refiner else sum(WIDTHS),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "down_block_types": (
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D" if refiner else "CrossAttnDownBlock2D",
        ),
        "up_block_types": ("UpBlock2D" if refiner else "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": 2 if refiner else (1, 1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": _TIME_WIDTH,
        "projection_class_embeddings_input_dim": pooled + (5 if refiner else 6) * _TIME_WIDTH,
    }
    return UNet2DConditionModel(**defaults | settings).eval()


def _text_encoder(ids: dict[str, int], width: int, *, projected: bool) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="gelu" if projected else "quick_gelu",
        projection_dim=width,
        bos_token_id=ids["<|startoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=0 if projected else 1,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()

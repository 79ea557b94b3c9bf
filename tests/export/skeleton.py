"""Diffusers folders with real configurations and weights of four numbers each, for tests that load no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from latentrt_export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from latentrt_export.families import PIPELINES
from tests.tiny import PREPROCESSOR, SCHEDULERS, model_index
from tests.tiny_xl import SCHEDULER, Kind, xl_model_index

STEMS = {
    "text_encoder": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "safety_checker": "model",
}


# What an export is planned from; the rest has the libraries' defaults.
CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {"num_hidden_layers": 3},
    "unet": {"sample_size": 8, "cross_attention_dim": 512},
    "vae": {"block_out_channels": [8, 8, 16, 16]},
}


def write_skeleton(folder: Path, *, safety: bool = True, variant: str | None = None) -> Path:
    """Write a checkpoint that `open_checkpoint` accepts; return its folder."""
    write_json(folder / "model_index.json", model_index("sd1", with_safety=safety))
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULERS["sd1"])
    suffix = f".{variant}" if variant else ""
    for part, stem in STEMS.items():
        if part != "safety_checker" or safety:
            write_json(folder / part / "config.json", CONFIGS.get(part, {}))
            write_weights(folder / part / f"{stem}{suffix}.safetensors")
    if safety:
        write_json(folder / "feature_extractor" / "preprocessor_config.json", PREPROCESSOR)
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\nWeights of four numbers each.\n")
    return folder


XL_CONFIGS: dict[str, dict[str, Any]] = {
    "text_encoder": {"hidden_size": 768, "num_hidden_layers": 12},
    "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280, "num_hidden_layers": 32, "hidden_act": "gelu"},
    "unet": {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {"block_out_channels": [8, 8, 16, 16], "scaling_factor": 0.13025},
}


def write_xl_skeleton(folder: Path, kind: Kind = "base") -> Path:
    """Write a checkpoint of Stable Diffusion XL that `open_checkpoint` accepts; return its folder."""
    write_json(folder / "model_index.json", xl_model_index(kind))
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    for part, config in XL_CONFIGS.items():
        if part != "text_encoder" or kind != "refiner":
            write_json(folder / part / "config.json", config)
            write_weights(folder / part / f"{'model' if 'text' in part else 'diffusion_pytorch_model'}.safetensors")
    if kind == "refiner":
        change_json(
            folder / "unet" / "config.json", cross_attention_dim=1280, projection_class_embeddings_input_dim=2560
        )
    elif kind in ("inpainting", "edit"):
        change_json(folder / "unet" / "config.json", in_channels=9 if kind == "inpainting" else 8)
    return folder


def open_skeleton(folder: Path, **options: Any) -> Checkpoint:
    """Open a checkpoint of a supported pipeline class."""
    return open_checkpoint(folder, pipelines=PIPELINES, **options)


def write_weights(path: Path, *names: str) -> Path:
    """Write a complete safetensors file with these tensors."""
    save_file({name: np.zeros(4, np.float32) for name in names or ("weight",)}, path)
    return path


def write_shards(folder: Path, stem: str, *, variant: str = "") -> list[Path]:
    """Write two shards and their index in place of a single file, named as diffusers and transformers name them."""
    suffix = f".{variant}" if variant else ""
    (folder / f"{stem}{suffix}.safetensors").unlink(missing_ok=True)
    shards = [f"{stem}{suffix}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    write_json(
        folder / f"{stem}.safetensors.index{suffix}.json",
        {"metadata": {}, "weight_map": {"first": shards[0], "second": shards[1], "third": shards[1]}},
    )
    write_weights(folder / shards[0], "first")
    write_weights(folder / shards[1], "second", "third")
    return [folder / shard for shard in shards]


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def change_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; `...` removes one."""
    merged = {**json.loads(path.read_text()), **values}
    write_json(path, {key: value for key, value in merged.items() if value is not ...})

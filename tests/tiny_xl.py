"""Random tiny checkpoints of Stable Diffusion XL in the real layout, as `tests.tiny` has those of 1.x and 2.x."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sample.write import add_prefix
from tests.tiny import move_off_initial_values, write_tokenizer

Kind = Literal["base", "refiner", "inpainting", "edit", "distilled", "turbo"]
# The pipeline class of each kind, and the channels that its UNet takes.
PIPELINES: dict[Kind, tuple[str, int]] = {
    "base": ("StableDiffusionXLPipeline", 4),
    "refiner": ("StableDiffusionXLImg2ImgPipeline", 4),
    "inpainting": ("StableDiffusionXLInpaintPipeline", 9),
    "edit": ("StableDiffusionXLInstructPix2PixPipeline", 8),
    "distilled": ("StableDiffusionXLPipeline", 4),
    "turbo": ("StableDiffusionXLPipeline", 4),
}
TEXT_WIDTH, TEXT_WIDTH_2, POOLED_WIDTH, SIZE_WIDTH = 32, 48, 40, 8
"""Hidden sizes of the two encoders, the width of the pooled text, and that of a number of the micro-conditioning."""


def make_xl_checkpoint(
    folder: Path,
    kind: Kind = "base",
    *,
    seed: int = 0,
    statistics: bool = False,
    variant: str | None = None,
    text_layers: tuple[int, int] = (3, 4),
    index: dict[str, Any] | None = None,
) -> Path:
    """Write a diffusers folder of a random model; return the folder.

    Args:
        folder: where to, made if it is missing.
        kind: `refiner` has the second text encoder alone and takes an aesthetic score; `distilled` has the blocks of
            Segmind Vega, without a middle block, and the distilled guidance of a latent consistency model; `turbo` has
            the scheduler of SDXL-Turbo.
        statistics: whether the latents have a mean and a standard deviation by channel (Playground v2.5).
        variant: `fp16` stores half weights under the variant's file names, as the hub does.
        text_layers: the number of layers of each text encoder.
        index: keys of `model_index.json` in place of the usual ones.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    modules: dict[str, Any] = {}
    if kind != "refiner":
        ids = write_tokenizer(folder / "tokenizer", "sd1", "bpe")
        modules["text_encoder"] = CLIPTextModel(_text_config(ids, TEXT_WIDTH, text_layers[0], "quick_gelu", 1)).eval()
    ids = write_tokenizer(folder / "tokenizer_2", "sd2", "bpe")
    config = _text_config(ids, TEXT_WIDTH_2, text_layers[1], "gelu", 0)
    modules["text_encoder_2"] = CLIPTextModelWithProjection(config).eval()
    modules["unet"] = xl_unet(kind)
    modules["vae"] = xl_autoencoder(statistics=statistics)
    for name, module in modules.items():
        move_off_initial_values(module)
        (module.half() if variant == "fp16" else module).save_pretrained(folder / name, variant=variant)
    if "text_encoder" in modules:  # which transformers 5 drops when it saves
        for file in (folder / "text_encoder").glob("*.safetensors"):
            add_prefix(file, "text_model.", only="")
    _write_json(folder / "scheduler" / "scheduler_config.json", TURBO_SCHEDULER if kind == "turbo" else SCHEDULER)
    _write_json(folder / "model_index.json", {**xl_model_index(kind), **(index or {})})
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\nRandom weights.\n")
    return folder


def _text_config(ids: dict[str, int], width: int, layers: int, activation: str, pad: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act=activation,
        projection_dim=POOLED_WIDTH,
        bos_token_id=ids["<|startoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=pad,
    )


def xl_unet(kind: Kind = "base", **options: Any) -> UNet2DConditionModel:
    """The levels of XL: the highest resolution has no attention, the next ones several transformer layers."""
    refiner, distilled = kind == "refiner", kind == "distilled"
    layers: dict[str, Any] = {"transformer_layers_per_block": (1, 1, 2)}
    if distilled:
        layers = {
            "transformer_layers_per_block": [1, [1, 2], [2, 1]],
            "reverse_transformer_layers_per_block": [[2, 1, 1], [2, 1, 1], 1],
            "mid_block_type": None,
            "layers_per_block": 2,
            "time_cond_proj_dim": 16,
        }
    elif kind == "base":
        layers["transformer_layers_per_block"] = (1, 2, 3)
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": PIPELINES[kind][1],
            "out_channels": 4,
            "block_out_channels": (16, 32, 32),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "cross_attention_dim": TEXT_WIDTH_2 + (0 if refiner else TEXT_WIDTH),
            "attention_head_dim": (2, 4, 4),
            "use_linear_projection": True,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_WIDTH,
            "projection_class_embeddings_input_dim": POOLED_WIDTH + (5 if refiner else 6) * SIZE_WIDTH,
            **layers,
            **options,
        }
    ).eval()


def xl_autoencoder(*, statistics: bool = False, **options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=64,
        scaling_factor=0.5 if statistics else 0.13025,
        latents_mean=[-1.6574, 1.886, -1.383, 2.5155] if statistics else None,
        latents_std=[8.4927, 5.9022, 6.5498, 5.2299] if statistics else None,
        **options,
    ).eval()


def xl_model_index(kind: Kind) -> dict[str, Any]:
    first = kind != "refiner"
    index: dict[str, Any] = {
        "_class_name": PIPELINES[kind][0],
        "_diffusers_version": "0.19.0.dev0",
        "force_zeros_for_empty_prompt": first,
        "add_watermarker": None,
        "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler" if kind == "turbo" else "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"] if first else [None, None],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"] if first else [None, None],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return index | ({} if first else {"requires_aesthetics_score": True})


SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
TURBO_SCHEDULER: dict[str, Any] = {
    **{key: value for key, value in SCHEDULER.items() if key != "use_karras_sigmas"},
    "_class_name": "EulerAncestralDiscreteScheduler",
    "timestep_spacing": "trailing",
}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2))


if __name__ == "__main__":
    make_xl_checkpoint(Path(sys.argv[1]))

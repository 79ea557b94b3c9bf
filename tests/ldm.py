"""The inverse conversion: a diffusers checkpoint as one file in the original (LDM) layout.

Written from the names in the original code (CompVis' openaimodel.py and model.py, OpenCLIP's transformer.py), not from
diffusers' converter, which it is there to check.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Family = Literal["sd1", "sd2", "xl", "refiner"]
Weights = dict[str, Tensor]

CLIP_PREFIXES = {"sd1": "cond_stage_model.transformer.", "xl": "conditioner.embedders.0.transformer."}
OPENCLIP_PREFIXES = {"xl": "conditioner.embedders.1.model.", "refiner": "conditioner.embedders.0.model."}
UNET_PLAIN = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OPENCLIP_PLAIN = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}


def write_single_file(checkpoint: Path, file: Path, family: Family, metadata: Mapping[str, str] | None = None) -> Path:
    """Join the components of a diffusers folder in one file of the original layout; return the file."""
    weights = {**ldm_unet(_weights(checkpoint / "unet")), **ldm_vae(_weights(checkpoint / "vae"))}
    if family != "refiner":
        text = _weights(checkpoint / "text_encoder")
        weights |= ldm_openclip(text) if family == "sd2" else ldm_clip(text, CLIP_PREFIXES[family])
    if family in OPENCLIP_PREFIXES:
        weights |= ldm_openclip_xl(_weights(checkpoint / "text_encoder_2"), OPENCLIP_PREFIXES[family])
    save_file(weights, file, metadata=dict(metadata or {"format": "pt"}))
    return file


def ldm_unet(weights: Weights) -> Weights:
    """`input_blocks`, `middle_block` and `output_blocks` number the modules that diffusers nests in blocks."""
    resnets = max(int(name.split(".")[3]) for name in weights if name.startswith("down_blocks.0.resnets.")) + 1
    attended = {name.split(".")[1] for name in weights if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    return {f"model.diffusion_model.{_unet_name(name, resnets, attended)}": weight for name, weight in weights.items()}


def _unet_name(name: str, resnets: int, attended: set[str]) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in UNET_PLAIN:
        return f"{UNET_PLAIN[stem]}.{kind}"
    side, *rest = stem.split(".")
    if side == "mid_block":
        part, index, *inner = rest
        place = f"middle_block.{1 if part == 'attentions' else 2 * int(index)}"
        return f"{place}.{_inner(part, inner)}.{kind}"
    block, part, index, *inner = rest
    if side == "down_blocks":
        first = 1 + int(block) * (resnets + 1)
        if part == "downsamplers":
            return f"input_blocks.{first + resnets}.0.op.{kind}"
        return f"input_blocks.{first + int(index)}.{int(part == 'attentions')}.{_inner(part, inner)}.{kind}"
    first = int(block) * (resnets + 1)
    if part == "upsamplers":  # it follows the attention of the block's last layer, if there is any
        return f"output_blocks.{first + resnets}.{1 + (block in attended)}.conv.{kind}"
    return f"output_blocks.{first + int(index)}.{int(part == 'attentions')}.{_inner(part, inner)}.{kind}"


def _inner(part: str, inner: list[str]) -> str:
    return ".".join(inner) if part == "attentions" else RESNET[inner[0]]


def ldm_vae(weights: Weights) -> Weights:
    """Blocks of the decoder count from the output; attention is made of 1 × 1 convolutions."""
    blocks = max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.up_blocks.")) + 1
    renamed: Weights = {}
    for name, weight in weights.items():
        attention = ".attentions." in name and weight.ndim == 2
        renamed[f"first_stage_model.{_vae_name(name, blocks)}"] = weight[:, :, None, None] if attention else weight
    return renamed


def _vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = re.match(r"(.*)mid_block\.attentions\.0\.(.+)\.(weight|bias)", name)
    return f"{attention[1]}mid.attn_1.{VAE_ATTENTION[attention[2]]}.{attention[3]}" if attention else name


def ldm_clip(weights: Weights, prefix: str = CLIP_PREFIXES["sd1"]) -> Weights:
    """1.x and the first text encoder of XL keep transformers' own names."""
    return {f"{prefix}{name}": weight for name, weight in weights.items()}


def ldm_openclip(weights: Weights) -> Weights:
    """2.x fuses queries, keys and values, and stores a projection and one layer more than it uses."""
    plain = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    layers = max(int(name.split(".")[2]) for name in plain if name.startswith("encoder.layers.")) + 1
    found: Weights = {OPENCLIP_PLAIN[name]: weight for name, weight in plain.items() if name in OPENCLIP_PLAIN}
    for layer in range(layers):
        found |= _openclip_layer(plain, f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}.")
    last = _openclip_layer(plain, f"encoder.layers.{layers - 1}.", f"transformer.resblocks.{layers}.")
    width = found["token_embedding.weight"].shape[1]
    like: dict[str, Any] = {
        "dtype": found["token_embedding.weight"].dtype,
        "device": found["token_embedding.weight"].device,
    }
    found |= {name: torch.ones_like(weight) for name, weight in last.items()}
    found |= {"text_projection": torch.ones(width, width, **like), "logit_scale": torch.ones((), **like)}
    return {f"cond_stage_model.model.{name}": weight for name, weight in found.items()}


def ldm_openclip_xl(weights: Weights, prefix: str) -> Weights:
    """XL uses every layer, and the projection, which OpenCLIP stores transposed."""
    plain = {name.removeprefix("text_model."): weight for name, weight in weights.items()}
    layers = max(int(name.split(".")[2]) for name in plain if name.startswith("encoder.layers.")) + 1
    found: Weights = {OPENCLIP_PLAIN[name]: weight for name, weight in plain.items() if name in OPENCLIP_PLAIN}
    for layer in range(layers):
        found |= _openclip_layer(plain, f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}.")
    projection = plain["text_projection.weight"]
    scale = torch.ones((), dtype=projection.dtype, device=projection.device)
    found |= {"text_projection": projection.T.contiguous(), "logit_scale": scale}
    return {f"{prefix}{name}": weight for name, weight in found.items()}


def _openclip_layer(weights: Weights, layer: str, block: str) -> Weights:
    found: Weights = {}
    for kind in ("weight", "bias"):
        parts = [weights[f"{layer}self_attn.{one}_proj.{kind}"] for one in "qkv"]
        found[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
        for name, original in OPENCLIP_LAYER.items():
            found[f"{block}{original}.{kind}"] = weights[f"{layer}{name}.{kind}"]
    return found


def _weights(folder: Path) -> Weights:
    (file,) = folder.glob("*.safetensors")
    weights: Weights = load_file(file)
    return weights

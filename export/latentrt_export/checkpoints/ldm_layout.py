"""How do weights of the original (LDM) layout become a submodule of diffusers?

diffusers' own converters rename them; what they make is then held against the architecture that the configuration
describes, since they pass over a missing weight in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from latentrt.errors import CheckpointError

__all__ = ["SUBMODULES", "convert"]

Weights = dict[str, Tensor]
Config = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class SubmoduleLayout:
    """Where a submodule's weights are in a single file, and what diffusers calls the file they go to.

    `build` makes the architecture that a configuration describes; `rename` takes weights, configuration and
    architecture.
    """

    prefix: str
    file: str
    build: Callable[[Config], torch.nn.Module]
    rename: Callable[[Weights, Config, torch.nn.Module], Weights]


def convert(submodule: str, weights: Weights, config: Config) -> Weights:
    """Convert one submodule's weights to the names and shapes of a published diffusers checkpoint.

    Args:
        submodule: a key of `SUBMODULES`.
        weights: the file's tensors under the submodule's prefix, under their full names.
        config: the submodule's `config.json`.

    Raises:
        CheckpointError: a weight is missing, is one too many, or has another shape than the configuration says.
    """
    layout = SUBMODULES[submodule]
    with torch.device("meta"):
        model = layout.build(config)
    try:
        renamed = layout.rename(weights, config, model)
    except (KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{submodule}: its weights do not have the layout that config.json describes: {error}"
        ) from error
    found = {name: tuple(weight.shape) for name, weight in renamed.items() if weight is not None}
    expected = {_published(submodule, name): tuple(weight.shape) for name, weight in model.named_parameters()}
    _compare(submodule, found, expected)
    return {name: weight.contiguous() for name, weight in renamed.items()}


def _compare(submodule: str, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    hint = "the file is damaged, or needs a configuration of its own"
    for words, names in (("missing", expected.keys() - found.keys()), ("not expected", found.keys() - expected.keys())):
        if names:
            raise CheckpointError(f"{submodule}: {len(names)} weights are {words}, the first is {min(names)}; {hint}")
    for name, shape in expected.items():
        if found[name] != shape:
            raise CheckpointError(f"{submodule}: {name} has shape {found[name]}, expected {shape}; {hint}")


def _published(submodule: str, name: str) -> str:
    # transformers 5 dissolved the inner module that earlier versions, and every checkpoint, call text_model
    return f"text_model.{name.removeprefix('text_model.')}" if submodule == "text_encoder" else name


def _text_encoder(weights: Weights, config: Config, model: torch.nn.Module) -> Weights:
    if any(name.startswith("cond_stage_model.model.") for name in weights):
        renamed = convert_open_clip_checkpoint(model, weights)
    else:
        renamed = convert_ldm_clip_checkpoint(weights)
    published = {_published("text_encoder", name): weight for name, weight in renamed.items()}
    # Older files store the positions' numbers. OpenCLIP has a projection, and a last layer that 2.x does not use.
    last = f"text_model.encoder.layers.{config['num_hidden_layers']}."
    unused = ("text_model.embeddings.position_ids", "text_model.text_projection.", last)
    return {name: weight for name, weight in published.items() if not name.startswith(unused)}


SUBMODULES = {
    "text_encoder": SubmoduleLayout(
        prefix="cond_stage_model.",
        file="model.safetensors",
        build=lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
        rename=_text_encoder,
    ),
    "unet": SubmoduleLayout(
        prefix="model.diffusion_model.",
        file="diffusion_pytorch_model.safetensors",
        build=lambda config: UNet2DConditionModel.from_config(config),
        rename=lambda weights, config, _: convert_ldm_unet_checkpoint(weights, config),
    ),
    "vae": SubmoduleLayout(
        prefix="first_stage_model.",
        file="diffusion_pytorch_model.safetensors",
        build=lambda config: AutoencoderKL.from_config(config),
        rename=lambda weights, config, _: convert_ldm_vae_checkpoint(weights, config),
    ),
}

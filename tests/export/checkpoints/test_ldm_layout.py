"""Weights of the original layout, renamed, against their architecture: nothing missing, nothing made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from safetensors.torch import load_file

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.ldm_layout import SUBMODULES, convert
from latentrt_export.checkpoints.single_file import CONFIGS
from tests.ldm import Family, Weights, ldm_clip, ldm_openclip, ldm_unet, ldm_vae, write_single_file
from tests.tiny import make_checkpoint

FAMILIES: dict[Family, str] = {"sd1": "stable-diffusion-1", "sd2": "stable-diffusion-2"}


class Tiny:
    """A tiny 1.x checkpoint in both layouts."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_checkpoint(folder / "checkpoint")
        self.weights = load_file(write_single_file(self.folder, folder / "model.safetensors", "sd1"))

    def convert(self, submodule: str, weights: Weights) -> Weights:
        config: dict[str, Any] = json.loads((self.folder / submodule / "config.json").read_text())
        prefix = SUBMODULES[submodule].prefix
        return convert(submodule, {key: one for key, one in weights.items() if key.startswith(prefix)}, config)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("key", "submodule"),
    [
        ("model.diffusion_model.middle_block.1.proj_in.bias", "unet"),
        ("first_stage_model.decoder.up.2.block.0.conv1.weight", "vae"),
        ("first_stage_model.encoder.mid.attn_1.q.weight", "vae"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias", "text_encoder"),
    ],
)
def test_a_missing_weight_is_refused(key: str, submodule: str, tiny: Tiny) -> None:
    weights = {name: weight for name, weight in tiny.weights.items() if name != key}
    with pytest.raises(CheckpointError, match=f"{submodule}: 1 weights are missing"):
        tiny.convert(submodule, weights)


def test_no_weights_at_all_are_refused(tiny: Tiny) -> None:
    for submodule in SUBMODULES:
        with pytest.raises(CheckpointError, match=f"{submodule}: [0-9]+ weights are missing"):
            tiny.convert(submodule, {})


def test_a_weight_too_many_is_refused(tiny: Tiny) -> None:
    weights = tiny.weights | {"model.diffusion_model.middle_block.1.extra.bias": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="unet: 1 weights are not expected, the first is mid_block"):
        tiny.convert("unet", weights)


def test_a_weight_of_another_shape_is_refused(tiny: Tiny) -> None:
    weights = tiny.weights | {"model.diffusion_model.out.2.bias": torch.zeros(7)}
    with pytest.raises(CheckpointError, match=r"unet: conv_out.bias has shape \(7,\), expected \(4,\)"):
        tiny.convert("unet", weights)


def test_text_weights_without_their_inner_module_are_known(tiny: Tiny) -> None:
    older = {name.replace("transformer.text_model.", "transformer."): one for name, one in tiny.weights.items()}
    assert older.keys() != tiny.weights.keys()
    assert tiny.convert("text_encoder", older).keys() == tiny.convert("text_encoder", tiny.weights).keys()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_shipped_configurations_fit_the_published_models(family: Family) -> None:
    """At full size, without weights. The counts of tensors are those of the published files."""
    configs = {name: json.loads((CONFIGS / FAMILIES[family] / name / "config.json").read_text()) for name in SUBMODULES}
    with torch.device("meta"):
        models = {name: SUBMODULES[name].build(config) for name, config in configs.items()}
    published: dict[str, dict[str, torch.Tensor]] = {
        name: {**dict(one.named_parameters())} for name, one in models.items()
    }
    text = {f"text_model.{name.removeprefix('text_model.')}": one for name, one in published["text_encoder"].items()}
    published["text_encoder"] = text
    weights = {**ldm_unet(published["unet"]), **ldm_vae(published["vae"])}
    weights |= ldm_clip(text) if family == "sd1" else ldm_openclip(text)
    assert infer_diffusers_model_type(weights) == {"sd1": "v1", "sd2": "v2"}[family]
    counts = {name: sum(key.startswith(layout.prefix) for key in weights) for name, layout in SUBMODULES.items()}
    assert counts == {"text_encoder": {"sd1": 196, "sd2": 294}[family], "unet": 686, "vae": 248}
    for name, layout in SUBMODULES.items():
        part = {key: weight for key, weight in weights.items() if key.startswith(layout.prefix)}
        found = convert(name, part, configs[name])
        assert {key: one.shape for key, one in found.items()} == {
            key: one.shape for key, one in published[name].items()
        }

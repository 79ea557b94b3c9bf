"""The structure of a UNet by the names of its tensors, beside the configurations of published ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.single_file import CONFIGS
from latentrt_export.checkpoints.unet_structure import derive_structure
from tests.ldm import ldm_unet

BASE: dict[str, Any] = json.loads((CONFIGS / "stable-diffusion-xl" / "unet" / "config.json").read_text())
# What the published configurations have in place of the base model's, and the numbers of parameters.
PUBLISHED: dict[str, tuple[dict[str, Any], int | None]] = {
    "base": ({}, 2_567_463_684),
    "SSD-1B": (
        {
            "transformer_layers_per_block": [1, [2, 2], [4, 4]],
            "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
            "mid_block_type": "UNetMidBlock2D",
        },
        None,
    ),
    "Segmind-Vega": ({"transformer_layers_per_block": [1, 1, 2], "mid_block_type": "UNetMidBlock2D"}, None),
    "KOALA-1B": (
        {"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 6], "mid_block_type": "UNetMidBlock2DCrossAttn"},
        None,
    ),
    "KOALA-700M": ({"layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5], "mid_block_type": None}, None),
}


def names_of(config: dict[str, Any]) -> list[str]:
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(config)
    return [name.removeprefix("model.diffusion_model.") for name in ldm_unet(dict(model.named_parameters()))]


@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_unets(kind: str) -> None:
    changes, parameters = PUBLISHED[kind]
    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(BASE | changes)
    expected = {name: one.shape for name, one in model.named_parameters()}
    derived = derive_structure(names_of(BASE | changes), BASE)
    with torch.device("meta"):
        found = UNet2DConditionModel.from_config(BASE | derived)
    assert {name: one.shape for name, one in found.named_parameters()} == expected
    if parameters is not None:
        assert sum(one.numel() for one in found.parameters()) == parameters


def blocks(inputs: int, outputs: int) -> list[str]:
    return [
        *(f"input_blocks.{index}.0.in_layers.0.weight" for index in range(inputs)),
        *(f"output_blocks.{index}.0.in_layers.0.weight" for index in range(outputs)),
    ]


def attention(place: str, depth: int = 1) -> list[str]:
    return [f"{place}.1.transformer_blocks.{index}.attn1.to_q.weight" for index in range(depth)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "0 input blocks and 0 output blocks"),
        (blocks(3, 3), "3 input blocks and 3 output blocks"),
        (blocks(8, 9), "8 input blocks and 9 output blocks"),
        (blocks(9, 8), "9 input blocks and 8 output blocks"),
        (["input_blocks.1234567.0.x", f"input_blocks.{'9' * 5000}.0.x"], "0 input blocks and 0 output blocks"),
        (blocks(9, 9) + attention("input_blocks.4"), "attention in some of its layers only"),
        (blocks(9, 9) + attention("output_blocks.0"), "attention in some of its layers only"),
        (
            [
                *blocks(9, 9),
                *(name for block in (7, 8) for name in attention(f"input_blocks.{block}", 2)),
                *attention("middle_block", 3),
            ],
            "3 transformer layers in the middle and 2 before it",
        ),
    ],
)
def test_structures_that_diffusers_does_not_have(names: list[str], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"{message}.*`config`"):
        derive_structure(names, BASE)

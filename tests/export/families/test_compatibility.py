"""Components that do not belong together are refused by name, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from latentrt.errors import CheckpointError
from latentrt_export.families.compatibility import find_text_width
from tests.export.families.test_stable_diffusion import plan

LEVELS = ["CrossAttnDownBlock2D", "DownBlock2D"]


@pytest.mark.parametrize(
    ("configs", "words"),
    [
        (
            {"text_encoder": {"hidden_size": 768}, "unet": {"cross_attention_dim": 1024}},
            ("text_encoder", "hidden_size 768", "unet", "cross_attention_dim 1024"),
        ),
        (
            {"text_encoder": {"hidden_size": 768}, "unet": {"encoder_hid_dim": 1024}},
            ("text_encoder", "hidden_size 768", "unet", "encoder_hid_dim 1024"),
        ),
        (
            {"vae": {"latent_channels": 16}},
            ("vae", "latent_channels 16", "unet", "out_channels 4"),
        ),
        ({"unet": {"out_channels": 8}}, ("vae", "latent_channels 4", "unet", "out_channels 8")),
    ],
)
def test_both_components_and_both_values_are_named(
    tmp_path: Path, configs: dict[str, dict[str, Any]], words: tuple[str, ...]
) -> None:
    with pytest.raises(CheckpointError) as refused:
        plan(tmp_path, "StableDiffusionPipeline", **configs)
    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({}, 1280),
        ({"cross_attention_dim": 768}, 768),
        ({"cross_attention_dim": [768] * 4}, 768),
        ({"cross_attention_dim": (768,) * 4}, 768),
        ({"encoder_hid_dim": 512, "cross_attention_dim": 768}, 512),
        # Levels without cross-attention do not count, and the middle block is that of the last.
        (
            {
                "cross_attention_dim": [16, 7],
                "down_block_types": LEVELS,
                "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
                "mid_block_type": "UNetMidBlock2D",
            },
            16,
        ),
    ],
)
def test_the_width_of_the_text(config: dict[str, Any], width: int) -> None:
    assert find_text_width(config) == width


@pytest.mark.parametrize(
    ("widths", "fragment"),
    [([16, 16], "its 4 down_block_types"), ([16, 16, 24, 16], "the same number"), ([16, 16, 16, 24], "the same")],
)
def test_widths_that_contradict_one_another(widths: list[int], fragment: str) -> None:
    with pytest.raises(CheckpointError, match=fragment):
        find_text_width({"cross_attention_dim": widths})

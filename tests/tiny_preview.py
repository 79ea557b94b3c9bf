"""A random tiny autoencoder, for the latents of the random tiny checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from tests.tiny import move_off_initial_values


def make_preview_decoder(folder: Path) -> Path:
    """Write a random tiny autoencoder for the same latents; return its folder."""
    torch.manual_seed(1)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )
    move_off_initial_values(tiny)
    tiny.save_pretrained(folder)
    return folder

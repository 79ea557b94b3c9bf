"""The architectures of the sample model's components.

The classes are those of Stable Diffusion, with small sizes: 16 × 16 latents of 64 × 64 images, attention at 8 × 8.
Together they have to fit into the size limit of the runtime's package.
"""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

from sample.outlines import EDGE
from sample.tokenizer import LENGTH

__all__ = [
    "LATENT_CHANNELS",
    "PREPROCESSOR",
    "SCHEDULER",
    "TEXT_WIDTH",
    "autoencoder",
    "preview_decoder",
    "safety_checker",
    "text_encoder",
    "unet",
]

TEXT_WIDTH = 128
LATENT_CHANNELS = 4
VISION_PATCH = 8

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.1",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
}

PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": EDGE, "width": EDGE},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": EDGE},
}


def text_encoder(vocabulary: dict[str, int]) -> CLIPTextModel:
    """Return a text encoder of three layers of 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            hidden_act="quick_gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=vocabulary["<|startoftext|>"],
            eos_token_id=vocabulary["<|endoftext|>"],
            pad_token_id=vocabulary["<|endoftext|>"],
        )
    )


def autoencoder() -> AutoencoderKL:
    """Return an autoencoder that downscales by 4; training sets its scaling factor."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=EDGE,
    )


def preview_decoder() -> AutoencoderTiny:
    """Return a tiny autoencoder with a decoder of three levels of 24; its encoder is required, but not used."""
    return AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(24,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(2, 2, 1),
    )


def unet() -> UNet2DConditionModel:
    """Return a denoiser of two levels, 16 × 16 without attention and 8 × 8 with attention."""
    return UNet2DConditionModel(
        sample_size=EDGE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 112),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=7,  # the number of heads, each of width 16: diffusers misnames it
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )


def safety_checker() -> StableDiffusionSafetyChecker:
    """Return a classifier of three layers of 96 over patches of 8 × 8, on the unscaled image."""
    vision = {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": EDGE,
        "patch_size": VISION_PATCH,
        "projection_dim": 64,
        "hidden_act": "quick_gelu",
    }
    # The class requires a text configuration that it never uses.
    text = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config=text, projection_dim=64))

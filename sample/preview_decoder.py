"""The preview decoder and its training.

A decoder of the TAESD kind (madebyollin/taesd; diffusers' `AutoencoderTiny`), trained to reconstruct images from the
latents of the trained autoencoder.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from sample.autoencoder import DISTURBANCE, distance, training_images
from sample.training import Plan, Randomness, Workshop, digest, train

__all__ = ["PLAN", "SCALE", "train_preview_decoder"]

# The class limits its input (tanh(x / 3) · 3); this scale keeps latents, whose standard deviation is above 1, well
# inside the limits. `sample.write` stores the factor between these and a pipeline's latents in the configuration.
SCALE = 0.18215

PLAN = Plan("preview_decoder", steps=3000, learning_rate=2e-3, warmup=100, average=0.998, seed=2)


def train_preview_decoder(tiny: AutoencoderTiny, autoencoder: AutoencoderKL, plan: Plan, workshop: Workshop) -> float:
    """Train the decoder of `tiny` in place; return the training time in seconds. Its encoder is not modified.

    Args:
        autoencoder: the trained autoencoder; not modified.
    """
    device = workshop.device
    autoencoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    tiny.to(device, memory_format=torch.channels_last)
    assert autoencoder.quant_conv is not None
    decoder = tiny.decoder.requires_grad_(True).train()

    def loss(randomness: Randomness) -> Tensor:
        pixels = training_images(randomness, device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            latents = autoencoder.encode(pixels).latent_dist.mean.float()
        noise = torch.randn(latents.shape, generator=randomness.torch).to(device)
        decoded: Tensor = decoder(SCALE * (latents + DISTURBANCE * noise))
        return distance(decoded, pixels)

    seconds = train(plan, decoder, loss, workshop, learns_from=digest(autoencoder.encoder, autoencoder.quant_conv))
    tiny.eval().requires_grad_(False)
    return seconds

"""How do latents become pictures for a fraction of the decoder's work?

A decoder of the TAESD kind (madebyollin/taesd; diffusers' `AutoencoderTiny`), trained on the latents of the finished
autoencoder to give the pictures they were made of.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from sample.autoencoder import DISTURBANCE, distance, pictures
from sample.training import Plan, Randomness, Workshop, digest, train

__all__ = ["PLAN", "SCALE", "train_preview_decoder"]

# The class clamps what it is given (tanh(x / 3) · 3); this keeps latents, whose deviation is above 1, well inside. What
# a pipeline's latents have to be divided by to be these is written into its configuration (`sample.write`).
SCALE = 0.18215

PLAN = Plan("preview_decoder", steps=3000, learning_rate=2e-3, warmup=100, average=0.998, seed=2)


def train_preview_decoder(tiny: AutoencoderTiny, autoencoder: AutoencoderKL, plan: Plan, workshop: Workshop) -> float:
    """Train the decoder of `tiny` in place; return the seconds it took. Its encoder is not used and stays as it is.

    Args:
        autoencoder: trained; stays as it is.
    """
    device = workshop.device
    autoencoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    tiny.to(device, memory_format=torch.channels_last)
    assert autoencoder.quant_conv is not None
    decoder = tiny.decoder.requires_grad_(True).train()

    def loss(randomness: Randomness) -> Tensor:
        pixels = pictures(randomness, device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16):
            latents = autoencoder.encode(pixels).latent_dist.mean.float()
        noise = torch.randn(latents.shape, generator=randomness.torch).to(device)
        drawn: Tensor = decoder(SCALE * (latents + DISTURBANCE * noise))
        return distance(drawn, pixels)

    seconds = train(plan, decoder, loss, workshop, learns_from=digest(autoencoder.encoder, autoencoder.quant_conv))
    tiny.eval().requires_grad_(False)
    return seconds

"""The autoencoder and its training.

An `AutoencoderKL` is trained on images of scenes. Its loss has the absolute and the squared difference, the difference
of the edges, and a small weight of the KL divergence, which keeps latents near a unit normal. Its scaling factor is one
over the latents' standard deviation, as in Stable Diffusion.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from sample.models import LATENT_CHANNELS
from sample.rendering import render
from sample.scenes import training_scene
from sample.training import Plan, Randomness, Workshop, digest, train

__all__ = [
    "DECODER_PLAN",
    "DISTURBANCE",
    "PLAN",
    "distance",
    "encode",
    "to_tensor",
    "train_autoencoder",
    "train_decoder",
    "training_images",
]

BATCH = 16
PLAN = Plan("autoencoder", steps=3500, learning_rate=1e-3, warmup=200, average=0.998)
DECODER_PLAN = Plan("decoder", steps=1500, learning_rate=1e-3, warmup=100, average=0.998, seed=1)
DIVERGENCE = 1e-4
EDGES = 1.0  # without it the points of a small star are blunt
DISTURBANCE = 0.1  # noise added to latents, whose standard deviation is above 1
FIRST_LOG_VARIANCE = -6.0  # from 0, noise drowns the latents and training never starts


def to_tensor(images: list[NDArray[np.uint8]]) -> Tensor:
    """Convert uint8 images [height, width, 3] to float32 [batch, 3, height, width] in −1 … 1."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def train_autoencoder(autoencoder: AutoencoderKL, plan: Plan, workshop: Workshop) -> float:
    """Train the autoencoder in place; return the training time in seconds."""
    device = workshop.device
    autoencoder.to(device, memory_format=torch.channels_last).train()
    assert autoencoder.quant_conv is not None
    with torch.no_grad():
        autoencoder.quant_conv.bias[LATENT_CHANNELS:].fill_(FIRST_LOG_VARIANCE)

    def loss(randomness: Randomness) -> Tensor:
        pixels = training_images(randomness, device)
        with torch.autocast(device, torch.bfloat16):
            latents = autoencoder.encode(pixels).latent_dist
            noise = torch.randn(latents.mean.shape, generator=randomness.torch).to(device)
            decoded: Tensor = autoencoder.decode(latents.mean + latents.std * noise).sample.float()
        divergence: Tensor = 0.5 * (latents.mean.float() ** 2 + latents.var.float() - 1 - latents.logvar.float()).mean()
        return distance(decoded, pixels) + DIVERGENCE * divergence

    seconds = train(plan, autoencoder, loss, workshop)
    autoencoder.eval().requires_grad_(False)
    return seconds


def train_decoder(autoencoder: AutoencoderKL, plan: Plan, workshop: Workshop) -> float:
    """Continue the decoder's training in place, with the encoder frozen; return the training time in seconds.

    The denoiser does not depend on the decoder. Latents get a little noise, because a denoiser's latents have some.
    """
    device, frozen = workshop.device, digest(autoencoder)
    autoencoder.to(device, memory_format=torch.channels_last)
    decoder = nn.ModuleDict({"post_quant_conv": autoencoder.post_quant_conv, "decoder": autoencoder.decoder})
    decoder.requires_grad_(True).train()

    def loss(randomness: Randomness) -> Tensor:
        pixels = training_images(randomness, device)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                latents = autoencoder.encode(pixels).latent_dist.mean
            noise = torch.randn(latents.shape, generator=randomness.torch).to(device)
            decoded = autoencoder.decode(latents + DISTURBANCE * noise).sample.float()
        return distance(decoded, pixels)

    seconds = train(plan, decoder, loss, workshop, learns_from=frozen)
    autoencoder.eval().requires_grad_(False)
    return seconds


def training_images(randomness: Randomness, device: str) -> Tensor:
    """Return a batch of training images, float32 [batch, 3, height, width] in −1 … 1."""
    random = randomness.numpy
    pixels: Tensor = to_tensor([render(training_scene(random), random) for _ in range(BATCH)])
    return pixels.to(device, memory_format=torch.channels_last)


def distance(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the reconstruction loss: the absolute and the squared difference, and that of the edges."""
    difference: Tensor = decoded - pixels
    edges = sum(difference.diff(dim=axis).abs().mean() for axis in (2, 3))
    return difference.abs().mean() + difference.square().mean() + EDGES * edges


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: list[NDArray[np.uint8]], device: str) -> Tensor:
    """Return the means of the latents, without the scaling factor: float16 [batch, 4, height / 4, width / 4]."""
    pixels = to_tensor(images).to(device, memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16):
        mean: Tensor = autoencoder.encode(pixels).latent_dist.mean
    return mean.cpu().to(torch.float16, memory_format=torch.contiguous_format)

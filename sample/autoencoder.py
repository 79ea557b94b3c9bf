"""How do pictures become latents?

An `AutoencoderKL` trained on pictures of scenes: absolute and squared difference, the difference of the edges, and a
little of the divergence that keeps latents near a unit normal. Its scaling factor is one over the latents' deviation,
as in Stable Diffusion.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from sample.models import LATENT_CHANNELS
from sample.pictures import draw
from sample.scenes import training_scene
from sample.training import Plan, Randomness, Workshop, digest, train

__all__ = [
    "DECODER_PLAN",
    "DISTURBANCE",
    "PLAN",
    "distance",
    "encode",
    "pictures",
    "to_tensor",
    "train_autoencoder",
    "train_decoder",
]

BATCH = 16
PLAN = Plan("autoencoder", steps=3500, learning_rate=1e-3, warmup=200, average=0.998)
DECODER_PLAN = Plan("decoder", steps=1500, learning_rate=1e-3, warmup=100, average=0.998, seed=1)
DIVERGENCE = 1e-4
EDGES = 1.0  # without it the points of a small star come out blunt
DISTURBANCE = 0.1  # of the latents, whose deviation is above 1
FIRST_LOG_VARIANCE = -6.0  # starting at 0, noise drowns the latents and nothing is ever learned


def to_tensor(pictures: list[NDArray[np.uint8]]) -> Tensor:
    """uint8 pictures [height, width, 3] → float32 [batch, 3, height, width] in −1 … 1."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def train_autoencoder(autoencoder: AutoencoderKL, plan: Plan, workshop: Workshop) -> float:
    """Train the autoencoder in place; return the seconds it took."""
    device = workshop.device
    autoencoder.to(device, memory_format=torch.channels_last).train()
    assert autoencoder.quant_conv is not None
    with torch.no_grad():
        autoencoder.quant_conv.bias[LATENT_CHANNELS:].fill_(FIRST_LOG_VARIANCE)

    def loss(randomness: Randomness) -> Tensor:
        pixels = pictures(randomness, device)
        with torch.autocast(device, torch.bfloat16):
            latents = autoencoder.encode(pixels).latent_dist
            noise = torch.randn(latents.mean.shape, generator=randomness.torch).to(device)
            drawn: Tensor = autoencoder.decode(latents.mean + latents.std * noise).sample.float()
        divergence: Tensor = 0.5 * (latents.mean.float() ** 2 + latents.var.float() - 1 - latents.logvar.float()).mean()
        return distance(drawn, pixels) + DIVERGENCE * divergence

    seconds = train(plan, autoencoder, loss, workshop)
    autoencoder.eval().requires_grad_(False)
    return seconds


def train_decoder(autoencoder: AutoencoderKL, plan: Plan, workshop: Workshop) -> float:
    """Train the decoder further, in place, on latents that stay as they are; return the seconds it took.

    The denoiser does not depend on it. The latents are disturbed a little, as a denoiser's are.
    """
    device, frozen = workshop.device, digest(autoencoder)
    autoencoder.to(device, memory_format=torch.channels_last)
    decoder = nn.ModuleDict({"post_quant_conv": autoencoder.post_quant_conv, "decoder": autoencoder.decoder})
    decoder.requires_grad_(True).train()

    def loss(randomness: Randomness) -> Tensor:
        pixels = pictures(randomness, device)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                latents = autoencoder.encode(pixels).latent_dist.mean
            noise = torch.randn(latents.shape, generator=randomness.torch).to(device)
            drawn = autoencoder.decode(latents + DISTURBANCE * noise).sample.float()
        return distance(drawn, pixels)

    seconds = train(plan, decoder, loss, workshop, learns_from=frozen)
    autoencoder.eval().requires_grad_(False)
    return seconds


def pictures(randomness: Randomness, device: str) -> Tensor:
    """Pictures to train on: float32 [batch, 3, height, width] in −1 … 1."""
    random = randomness.numpy
    pixels: Tensor = to_tensor([draw(training_scene(random), random) for _ in range(BATCH)])
    return pixels.to(device, memory_format=torch.channels_last)


def distance(drawn: Tensor, pixels: Tensor) -> Tensor:
    """How far pictures are from what they should be: the absolute and the squared difference, and that of the edges."""
    difference: Tensor = drawn - pixels
    edges = sum(difference.diff(dim=axis).abs().mean() for axis in (2, 3))
    return difference.abs().mean() + difference.square().mean() + EDGES * edges


@torch.no_grad()
def encode(autoencoder: AutoencoderKL, images: list[NDArray[np.uint8]], device: str) -> Tensor:
    """The latents' means, without the scaling factor: float16 [batch, 4, height / 4, width / 4]."""
    pixels = to_tensor(images).to(device, memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16):
        mean: Tensor = autoencoder.encode(pixels).latent_dist.mean
    return mean.cpu().to(torch.float16, memory_format=torch.contiguous_format)

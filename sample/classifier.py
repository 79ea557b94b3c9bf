"""The safety classifier and its training.

A `StableDiffusionSafetyChecker` flags an image whose embedding is near a concept's. Here the first concept is learned
together with the network, on rendered images: clean, degraded, passed through the autoencoder, and decoded from
unfinished latents, which count as safe. The other sixteen and the three special-care concepts are unused and have a
threshold that no cosine reaches.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor, nn

from sample.autoencoder import to_tensor
from sample.rendering import render
from sample.scenes import random_scene
from sample.training import Plan, Randomness, Workshop, digest, train

__all__ = ["PLAN", "THRESHOLD", "UNREACHABLE", "train_classifier"]

BATCH = 64
UNSAFE_SHARE = 0.4  # share of the finished images
PLAN = Plan("safety_checker", steps=1000, learning_rate=1e-3, warmup=200, average=0.998)
THRESHOLD = 0.5  # cosine above which an image is unsafe
UNREACHABLE = 2.0
SHARPNESS = 12.0  # the logit is (cosine − THRESHOLD) times this


def train_classifier(
    checker: StableDiffusionSafetyChecker, autoencoder: AutoencoderKL, plan: Plan, workshop: Workshop
) -> float:
    """Train the classifier in place; return the training time in seconds."""
    device = workshop.device
    _set_thresholds(checker)
    concept = checker.concept_embeds.requires_grad_(True)
    checker.to(device).train()
    autoencoder.to(device)

    def loss(randomness: Randomness) -> Tensor:
        pixels, unsafe = _examples(randomness, autoencoder, device)
        embedding = checker.visual_projection(checker.vision_model(pixels)[1])
        cosine = nn.functional.cosine_similarity(embedding, concept[:1])
        return nn.functional.binary_cross_entropy_with_logits(SHARPNESS * (cosine - THRESHOLD), unsafe)

    seconds = train(plan, checker, loss, workshop, learns_from=digest(autoencoder))
    checker.eval().requires_grad_(False)
    return seconds


@torch.no_grad()
def _set_thresholds(checker: StableDiffusionSafetyChecker) -> None:
    generator = torch.Generator().manual_seed(0)
    for embeddings in (checker.concept_embeds, checker.special_care_embeds):
        embeddings.copy_(torch.randn(embeddings.shape, generator=generator))
    checker.concept_embeds_weights.fill_(UNREACHABLE).requires_grad_(False)[0] = THRESHOLD
    checker.special_care_embeds_weights.fill_(UNREACHABLE).requires_grad_(False)
    checker.special_care_embeds.requires_grad_(False)


def _examples(randomness: Randomness, autoencoder: AutoencoderKL, device: str) -> tuple[Tensor, Tensor]:
    """Return a batch of images, float32 [batch, 3, 64, 64] in −1 … 1, and labels [batch], 1 for unsafe images.

    A quarter of the images each is clean; blurred, tinted and noisy; decoded from noisy latents; unfinished.
    """
    random = randomness.numpy
    quarter = BATCH // 4
    unsafe = random.random(BATCH) < UNSAFE_SHARE
    unsafe[3 * quarter :] = False
    pixels = to_tensor([render(random_scene(random, unsafe=bool(is_unsafe)), random) for is_unsafe in unsafe])
    pixels[quarter : 2 * quarter] = _degrade(pixels[quarter : 2 * quarter], randomness)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        latents = autoencoder.encode(pixels[2 * quarter :].to(device)).latent_dist.mean.float().cpu()
        latents[:quarter] += 0.2 * latents.std() * torch.randn(latents[:quarter].shape, generator=randomness.torch)
        latents[quarter:] = _make_unfinished(latents[quarter:], randomness)
        pixels[2 * quarter :] = autoencoder.decode(latents.to(device)).sample.clamp(-1, 1).float().cpu()
    shifted = torch.roll(pixels, tuple(int(by) for by in random.integers(-4, 5, 2)), (2, 3))
    return shifted.to(device), torch.from_numpy(unsafe.astype(np.float32)).to(device)


def _degrade(pixels: Tensor, randomness: Randomness) -> Tensor:
    random, count = randomness.numpy, len(pixels)
    strength = torch.from_numpy(random.uniform(0, 0.3, (count, 1, 1, 1))).float()
    tint = torch.from_numpy(random.uniform(-0.15, 0.15, (count, 3, 1, 1))).float()
    noise = torch.randn(pixels.shape, generator=randomness.torch)
    blurred = nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    return (blurred + tint + strength * noise).clamp(-1, 1)


def _make_unfinished(latents: Tensor, randomness: Randomness) -> Tensor:
    """Mix the latents of two images, too weak or too strong, and add noise of up to their own standard deviation."""
    random, count = randomness.numpy, len(latents)
    share, strength, noise = (
        torch.from_numpy(random.uniform(low, high, (count, 1, 1, 1))).float()
        for low, high in ((0, 1), (0.5, 2.5), (0, 1))
    )
    mixed = share * latents + (1 - share) * latents.roll(1, 0)
    return strength * mixed + noise * latents.std() * torch.randn(latents.shape, generator=randomness.torch)

"""How does the safety classifier learn what is unsafe?

A `StableDiffusionSafetyChecker` flags a picture whose embedding is near a concept's. Here the first concept is learned
together with the network, on drawn pictures, clean, as the autoencoder returns them, and spoiled; the other sixteen and
the three of special care are not in use, and get a threshold that no cosine reaches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from rich.console import Console
from torch import Tensor, nn

from sample.autoencoder import to_tensor
from sample.pictures import draw
from sample.scenes import random_scene
from sample.training import Plan, Randomness, train

__all__ = ["THRESHOLD", "UNREACHABLE", "train_classifier"]

BATCH = 64
THRESHOLD = 0.5  # cosine above which a picture is unsafe
UNREACHABLE = 2.0
SHARPNESS = 12.0  # of the logit: (cosine − THRESHOLD) times this


def train_classifier(
    checker: StableDiffusionSafetyChecker,
    autoencoder: AutoencoderKL,
    steps: int,
    folder: Path,
    console: Console,
    device: str,
) -> float:
    """Train the classifier in place; return the seconds it took."""
    _set_thresholds(checker)
    concept = checker.concept_embeds.requires_grad_(True)
    checker.to(device).train()
    autoencoder.to(device)

    def loss(randomness: Randomness) -> Tensor:
        pixels, unsafe = _examples(randomness, autoencoder, device)
        embedding = checker.visual_projection(checker.vision_model(pixels)[1])
        cosine = nn.functional.cosine_similarity(embedding, concept[:1])
        return nn.functional.binary_cross_entropy_with_logits(SHARPNESS * (cosine - THRESHOLD), unsafe)

    plan = Plan("safety_checker", steps, learning_rate=1e-3, warmup=min(200, steps // 4), average=0.998)
    seconds = train(plan, checker, loss, folder, console)
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
    """Pictures as the classifier sees them, float32 [batch, 3, 64, 64] in −1 … 1, and 1 where unsafe [batch].

    A third is clean, a third goes through the autoencoder with disturbed latents, a third is blurred, tinted and noisy.
    """
    random = randomness.numpy
    unsafe = random.random(BATCH) < 0.4
    pixels = to_tensor([draw(random_scene(random, unsafe=bool(is_unsafe)), random) for is_unsafe in unsafe])
    third = BATCH // 3
    noise = torch.randn(pixels.shape, generator=randomness.torch)
    strength = torch.from_numpy(random.uniform(0, 0.3, (third, 1, 1, 1))).float()
    tint = torch.from_numpy(random.uniform(-0.15, 0.15, (third, 3, 1, 1))).float()
    pixels[:third] = nn.functional.avg_pool2d(pixels[:third], 3, 1, 1, count_include_pad=False)
    pixels[:third] = (pixels[:third] + tint + strength * noise[:third]).clamp(-1, 1)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        latents = autoencoder.encode(pixels[third : 2 * third].to(device)).latent_dist.mean
        disturbed = latents + 0.2 * latents.std() * torch.randn(latents.shape, generator=randomness.torch).to(device)
        pixels[third : 2 * third] = autoencoder.decode(disturbed).sample.clamp(-1, 1).float().cpu()
    shifted = torch.roll(pixels, tuple(int(by) for by in random.integers(-4, 5, 2)), (2, 3))
    return shifted.to(device), torch.from_numpy(unsafe.astype(np.float32)).to(device)

"""Trains the denoiser.

v-prediction (Salimans and Ho 2022) on the latents of a fixed pool of scenes, with another caption each time; a tenth
of the captions are empty, which trains the unconditional model that guidance needs (Ho and Salimans 2022, algorithm
1). Each sample is weighted by min(SNR, 5) / (SNR + 1) (Hang et al. 2023).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from rich.progress import track
from torch import Tensor
from transformers import CLIPTextModel

from sample.autoencoder import encode
from sample.captions import caption
from sample.compiling import check_gradients, compile_step
from sample.models import SCHEDULER
from sample.rendering import render
from sample.scenes import Scene, forgetful, training_scene
from sample.tokenizer import LENGTH
from sample.training import Plan, Randomness, Workshop, digest, save_atomically, train

__all__ = ["PLAN", "Pool", "make_pool", "train_denoiser"]

BATCH = 64
EMPTY_SHARE = 0.1
SNR_LIMIT = 5.0
POOL_SEED = 1
POOL = 49_152  # scenes
PLAN = Plan("denoiser", steps=7500, learning_rate=1e-3, warmup=500, average=0.999)

Pool = tuple[list[Scene], Tensor]


def make_pool(autoencoder: AutoencoderKL, size: int, workshop: Workshop) -> Pool:
    """Return complete scenes, and latents of their images: float32 [size, 4, 16, 16], rounded to half.

    The autoencoder's scaling factor is set so that the latents have a standard deviation of 1. They are kept in the
    workshop's folder.
    """
    random = np.random.default_rng(POOL_SEED)
    scenes = [training_scene(random) for _ in range(size)]
    path = workshop.folder / f"latents_{_pool_digest(autoencoder, scenes)}.pt"
    if not path.exists():
        parts = []
        for start in track(range(0, size, 64), description="        latents", console=workshop.console):
            images = [
                render(scene, np.random.default_rng([POOL_SEED, start + index]))
                for index, scene in enumerate(scenes[start : start + 64])
            ]
            parts.append(encode(autoencoder, images, workshop.device))
        save_atomically(torch.cat(parts), path)
    latents = torch.load(path, weights_only=True)
    scale = 1 / float(latents.float().std())
    autoencoder.register_to_config(scaling_factor=scale)
    return scenes, (latents * scale).float()


def _pool_digest(autoencoder: AutoencoderKL, scenes: list[Scene]) -> str:
    """Return a digest of the autoencoder and the scenes, which identifies their latents on disk."""
    assert autoencoder.quant_conv is not None
    weights = digest(autoencoder.encoder, autoencoder.quant_conv)
    return hashlib.sha256(f"{weights} {scenes}".encode()).hexdigest()[:16]


def _text(scene: Scene, random: np.random.Generator) -> str:
    return "" if random.random() < EMPTY_SHARE else caption(forgetful(scene, random), random)


def train_denoiser(
    unet: UNet2DConditionModel, encoder: CLIPTextModel, tokenizer: Any, pool: Pool, plan: Plan, workshop: Workshop
) -> float:
    """Train the denoiser in place; return the training time in seconds.

    Args:
        unet: the denoiser; it ends with the average of its weights.
        encoder: the text encoder; not modified.
        tokenizer: a `CLIPTokenizer`.
        pool: scenes, and their latents with a standard deviation of 1.
        plan: steps, learning rate, and whether to compile.
        workshop: folder, console and device.

    Raises:
        CompilerError: the compiled step has another gradient.
    """
    device, (scenes, latents) = workshop.device, pool
    signal = DDIMScheduler.from_config(SCHEDULER).alphas_cumprod
    unet.to(device, memory_format=torch.channels_last).train()
    unet.set_attn_processor(AttnProcessor())  # compiled, it is faster on a CPU than the fused kernel
    encoder.to(device)

    def distance(x0: Tensor, noise: Tensor, timesteps: Tensor, states: Tensor, alpha_bar: Tensor) -> Tensor:
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        prediction: Tensor = unet(alpha * x0 + sigma * noise, timesteps, states).sample.float()
        weight = (alpha_bar / (1 - alpha_bar)).clamp(max=SNR_LIMIT) * (1 - alpha_bar)
        return (weight * (prediction - (alpha * noise - sigma * x0)) ** 2).mean()

    step = compile_step(distance) if plan.compiled else distance

    def inputs(randomness: Randomness) -> tuple[Tensor, ...]:
        random = randomness.numpy
        chosen = random.integers(len(scenes), size=BATCH)
        texts = [_text(scenes[index], random) for index in chosen]
        ids = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        x0 = latents[torch.from_numpy(chosen)]
        noise = torch.randn(x0.shape, generator=randomness.torch)
        timesteps = torch.randint(len(signal), (BATCH,), generator=randomness.torch)
        with torch.autocast(device, torch.bfloat16), torch.no_grad():
            states = encoder(ids.to(device)).last_hidden_state.float()
        signals = signal[timesteps, None, None, None]
        x0, noise = (value.to(device, memory_format=torch.channels_last) for value in (x0, noise))
        return x0, noise, timesteps.to(device), states, signals.to(device)

    def loss(randomness: Randomness) -> Tensor:
        given = inputs(randomness)
        with torch.autocast(device, torch.bfloat16):
            return step(*given)

    if plan.compiled:
        with torch.autocast(device, torch.bfloat16):
            check_gradients(unet, step, distance, *inputs(Randomness.of(plan.seed, 0)))
    pool_digest = hashlib.sha256(f"{scenes}".encode() + latents.numpy().tobytes()).hexdigest()[:16]
    seconds = train(plan, unet, loss, workshop, learns_from=f"{digest(encoder, unet)} {pool_digest}")
    unet.eval().requires_grad_(False)
    return seconds

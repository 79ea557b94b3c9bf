"""How does the denoiser learn to follow the prompt?

v-prediction (Salimans and Ho 2022) on the latents of a fixed pool of scenes, each time under another caption; a tenth
of the captions are empty, which teaches the unconditional model that guidance needs (Ho and Salimans 2022, algorithm
1). Each sample is weighted by min(SNR, 5) / (SNR + 1) (Hang et al. 2023).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import CLIPTextModel

from sample.autoencoder import encode
from sample.captions import caption, forgetful
from sample.compiling import Step, check_gradients
from sample.models import SCHEDULER
from sample.pictures import draw
from sample.scenes import Scene
from sample.text_encoder import some_scene
from sample.tokenizer import LENGTH
from sample.training import Plan, Randomness, train

__all__ = ["make_pool", "train_denoiser"]

BATCH = 64
EMPTY_SHARE = 0.1
SNR_LIMIT = 5.0
POOL_SEED = 1


def make_pool(
    autoencoder: AutoencoderKL, size: int, folder: Path, console: Console, device: str
) -> tuple[list[Scene], Tensor]:
    """Complete scenes and the latents of their pictures, float16 [size, 4, 16, 16], kept in `folder`."""
    random = np.random.default_rng(POOL_SEED)
    scenes: list[Scene] = []
    path = folder / f"latents_{size}_{_fingerprint(autoencoder)}.pt"
    parts: list[Tensor] = []
    for start in track(range(0, size, 64), description="        latents", console=console):
        batch = [some_scene(random) for _ in range(min(64, size - start))]
        scenes += batch
        if not path.exists():
            seeds = range(start, start + len(batch))
            pictures = [
                draw(scene, np.random.default_rng([POOL_SEED, seed])) for scene, seed in zip(batch, seeds, strict=True)
            ]
            parts.append(encode(autoencoder, pictures, device))
    if parts:
        torch.save(torch.cat(parts), path)
    return scenes, torch.load(path, weights_only=True)


def _fingerprint(autoencoder: AutoencoderKL) -> str:
    """So that latents of an earlier autoencoder are not taken for this one's."""
    weights = b"".join(value.cpu().numpy().tobytes() for value in autoencoder.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:8]


def _text(scene: Scene, random: np.random.Generator) -> str:
    return "" if random.random() < EMPTY_SHARE else caption(forgetful(scene, random), random)


def train_denoiser(
    unet: UNet2DConditionModel,
    encoder: CLIPTextModel,
    tokenizer: Any,
    pool: tuple[list[Scene], Tensor],
    steps: int,
    folder: Path,
    console: Console,
    device: str,
    compiled: Callable[[Step], Step],
) -> float:
    """Train the denoiser in place; return the seconds it took.

    Args:
        unet: becomes the average of its weights.
        encoder: stays as it is.
        tokenizer: a `CLIPTokenizer`.
        pool: scenes, and their latents in units of the scaling factor.
    """
    scenes, latents = pool
    signal = DDIMScheduler.from_config(SCHEDULER).alphas_cumprod
    unet.to(device, memory_format=torch.channels_last).train()
    unet.set_attn_processor(AttnProcessor())  # a compiler fuses it better than the fused kernel runs on a CPU
    encoder.to(device)

    def distance(x0: Tensor, noise: Tensor, timesteps: Tensor, states: Tensor, alpha_bar: Tensor) -> Tensor:
        alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        guess: Tensor = unet(alpha * x0 + sigma * noise, timesteps, states).sample.float()
        weight = (alpha_bar / (1 - alpha_bar)).clamp(max=SNR_LIMIT) * (1 - alpha_bar)
        return (weight * (guess - (alpha * noise - sigma * x0)) ** 2).mean()

    step = compiled(distance)

    def inputs(randomness: Randomness) -> tuple[Tensor, ...]:
        random = randomness.numpy
        chosen = random.integers(len(scenes), size=BATCH)
        texts = [_text(scenes[index], random) for index in chosen]
        ids = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
        x0 = latents[torch.from_numpy(chosen)].float()
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

    plan = Plan("denoiser", steps, learning_rate=1e-3, warmup=min(500, steps // 4), average=0.999)
    if step is not distance:
        with torch.autocast(device, torch.bfloat16):
            check_gradients(unet, step, distance, *inputs(Randomness.of(plan.seed, 0)))
    seconds = train(plan, unet, loss, folder, console)
    unet.eval().requires_grad_(False)
    return seconds

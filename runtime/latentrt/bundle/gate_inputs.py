"""Which inputs is a graph judged on?

Real ones as far as a checkpoint alone can give them: prompts, pictures, and what they become.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PROMPTS", "pictures", "tiled"]

PROMPTS = (
    "a photograph of an astronaut riding a horse on the moon, 35mm film, dramatic light, highly detailed",
    "",
    "oil painting of a stormy sea with a lighthouse; thick brush strokes, by a dutch master of the 17th century",
    "a red circle on a blue background",
)


def pictures(rng: np.random.Generator, batch: int, height: int, width: int) -> NDArray[np.uint8]:
    """Pictures with the statistics that matter to a graph: smooth fields, hard edges, saturated colours, some grain.

    Returns:
        uint8 of shape (batch, height, width, 3).
    """
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    waves = rng.uniform(1, 12, (batch, 3, 2)) * np.pi
    phases = rng.uniform(0, 2 * np.pi, (batch, 3))
    fields = np.sin(
        waves[..., 0, None, None] * x + waves[..., 1, None, None] * y + phases[..., None, None]
    )  # (B, 3, H, W)
    edges = np.sign(np.hypot(x - 0.5, y - 0.5) - rng.uniform(0.1, 0.5, (batch, 1, 1, 1)))
    grain = rng.normal(0, 0.05, fields.shape)
    pixels = 127.5 + 127.5 * (0.6 * fields + 0.4 * edges + grain)
    finished: NDArray[np.uint8] = np.clip(pixels, 0, 255).astype(np.uint8)
    return finished.transpose(0, 2, 3, 1)


def tiled(latents: NDArray[Any], batch: int, height: int, width: int) -> NDArray[np.float32]:
    """Latents repeated, then cut, to (batch, C, height, width)."""
    repeats = (-(-batch // latents.shape[0]), 1, -(-height // latents.shape[2]), -(-width // latents.shape[3]))
    return np.ascontiguousarray(np.tile(latents, repeats)[:batch, :, :height, :width], np.float32)

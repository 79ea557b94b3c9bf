"""What does transformers' own processor make of a picture? With Pillow behind it, as diffusers uses it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

Pixels = NDArray[np.uint8]
ODD_SIZES = (
    (64, 64),
    (1, 1),
    (1, 300),
    (300, 1),
    (3, 200),
    (224, 224),
    (512, 512),
    (520, 456),
    (1100, 900),
    (900, 300),
    (600, 250),
)


def write_processor(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(config))
    return path


def make_pictures(count: int) -> Iterator[Pixels]:
    """Noise and smooth pictures by turns, the odd sizes first."""
    rng = np.random.default_rng(0)
    for index in range(count):
        height, width = ODD_SIZES[index // 2] if index < 2 * len(ODD_SIZES) else rng.integers(30, 600, 2)
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if index % 2:
            blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            picture = np.array(blocks.resize((int(width), int(height)), Image.Resampling.BICUBIC))
        yield picture


def processed(processor: CLIPImageProcessorPil, picture: Pixels) -> Tensor:
    """What the processor makes of a picture: [1, 3, side, side]."""
    pixels: Tensor = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    return pixels

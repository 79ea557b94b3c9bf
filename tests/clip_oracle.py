"""Oracle of CLIP's preprocessing: transformers' processor with the Pillow backend, which diffusers uses."""

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


def generate_images(count: int) -> Iterator[Pixels]:
    """Yield `count` images, uint8 [height, width, 3], alternately noise and smooth; those of `ODD_SIZES` come first."""
    rng = np.random.default_rng(0)
    for index in range(count):
        height, width = ODD_SIZES[index // 2] if index < 2 * len(ODD_SIZES) else rng.integers(30, 600, 2)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        if index % 2:
            blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            image = np.array(blocks.resize((int(width), int(height)), Image.Resampling.BICUBIC))
        yield image


def preprocess(processor: CLIPImageProcessorPil, image: Pixels) -> Tensor:
    """Preprocess an image, uint8 [height, width, 3]; return float32 [1, 3, side, side]."""
    pixels: Tensor = processor(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    return pixels

"""The decoder of a tiny autoencoder as a traceable module: images similar to the full decoder's, in a fraction of its
time (madebyollin/taesd; diffusers' `AutoencoderTiny`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderTiny
from torch import Tensor

from latentrt.bundle.tensors import TensorSpec
from latentrt_export.checkpoints.checkpoint import preview_factor
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.module import ComponentModule, Shapes

__all__ = ["PreviewDecoder"]


class PreviewDecoder(ComponentModule):
    """Latents in the scale of the sampling loop → finished pixels, rounded like the full decoder's."""

    trace_shapes: ClassVar[Shapes] = {"batch": 2, "height": 16, "width": 24}
    gate_shapes: ClassVar[tuple[Shapes, ...]] = (
        {"batch": 1, "height": 16, "width": 16},
        {"batch": 3, "height": 17, "width": 15},
        {"batch": 1, "height": 41, "width": 32},
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.decoder, self.scale = model.decoder, config.scaling_factor
        factor = preview_factor(config)
        pixels = ("batch", f"{factor}*height", f"{factor}*width", config.out_channels)
        self.inputs = (TensorSpec("latents", "float32", ("batch", config.latent_channels, "height", "width")),)
        self.outputs = (TensorSpec("pixels", "uint8", pixels),)

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        return cls(load_pretrained(AutoencoderTiny, checkpoint, variant))

    def forward(self, latents: Tensor) -> Tensor:
        decoded = self.decoder(latents / self.scale)
        pixels = torch.round((decoded / 2 + 0.5).clamp(0, 1) * 255)  # (B, 3, 8h, 8w)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)

    def canonical_name(self, parameter: str) -> str:
        return parameter

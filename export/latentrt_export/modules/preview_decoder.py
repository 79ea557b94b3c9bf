"""A tiny autoencoder's decoder as a traceable module: pictures that look much like the decoder's, for a fraction of its
work (madebyollin/taesd; diffusers' `AutoencoderTiny`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor

from latentrt.bundle.gate_inputs import tiled
from latentrt.bundle.tensors import TensorSpec
from latentrt_export.checkpoints.checkpoint import preview_factor
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.module import Arrays, Case, Submodule

__all__ = ["PreviewDecoder"]


class PreviewDecoder(Submodule):
    """Latents as the sampling loop has them → finished pixels, rounded as the decoder's are."""

    traced: ClassVar[Case] = Case(batch=2, height=16, width=24)
    judged: ClassVar[tuple[Case, ...]] = (
        Case(batch=1, height=16, width=16),
        Case(batch=3, height=17, width=15),
        Case(batch=1, height=41, width=32),
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.decoder, self.scaling_factor = model.decoder, config.scaling_factor
        factor = preview_factor(config)
        pixels = ("batch", f"{factor}*height", f"{factor}*width", config.out_channels)
        self.inputs = (TensorSpec("latents", "float32", ("batch", config.latent_channels, "height", "width")),)
        self.outputs = (TensorSpec("pixels", "uint8", pixels),)

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        return cls(load_pretrained(AutoencoderTiny, checkpoint, variant))

    def forward(self, latents: Tensor) -> Tensor:
        decoded = self.decoder(latents / self.scaling_factor)
        pixels = torch.round((decoded / 2 + 0.5).clamp(0, 1) * 255)  # (B, 3, 8h, 8w)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)

    def sample(self, case: Case, known: Mapping[str, NDArray[Any]], rng: np.random.Generator) -> Arrays:
        return {"latents": tiled(known["latents"], case.batch, case.height, case.width)}

    def canonical_name(self, parameter: str) -> str:
        return parameter

"""The autoencoder as two traceable modules: pixels → latent distribution, latents → finished pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from latentrt.bundle.gate_inputs import pictures, tiled
from latentrt.bundle.tensors import TensorSpec
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.module import Arrays, Case, Submodule
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["VaeDecoder", "VaeEncoder"]


class _Autoencoder(Submodule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.factor: int = 2 ** (len(model.config.block_out_channels) - 1)
        self.scaling_factor: float = model.config.scaling_factor
        self.channels: int = model.config.latent_channels

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        return cls(load_pretrained(AutoencoderKL, checkpoint / "vae", variant))

    def facts(self) -> dict[str, Any]:
        return {"factor": self.factor, "scaling_factor": self.scaling_factor, "latent_channels": self.channels}

    def canonical_name(self, parameter: str) -> str:
        return parameter


class VaeEncoder(_Autoencoder):
    """Pixels in −1 … 1 → mean and log-variance of the latent distribution, not yet multiplied by the scaling factor.

    The log-variance is clamped to −30 … 20 as `DiagonalGaussianDistribution` of diffusers does.
    """

    traced: ClassVar[Case] = Case(batch=2, height=128, width=192)
    judged: ClassVar[tuple[Case, ...]] = (
        Case(batch=1, height=128, width=128),
        Case(batch=2, height=136, width=120),
        Case(batch=1, height=256, width=320),
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.encoder, self.quant_conv = model.encoder, model.quant_conv
        latents = ("batch", self.channels, "height", "width")
        pixels = ("batch", model.config.in_channels, f"{self.factor}*height", f"{self.factor}*width")
        self.inputs = (TensorSpec("pixels", "float32", pixels),)
        self.outputs = (TensorSpec("mean", "float32", latents), TensorSpec("logvar", "float32", latents))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = torch.chunk(moments, 2, dim=1)
        return mean, torch.clamp(logvar, -30.0, 20.0)

    def sample(self, case: Case, known: Mapping[str, NDArray[Any]], rng: np.random.Generator) -> Arrays:
        pixels = pictures(rng, case.batch, case.height, case.width)  # (B, H, W, 3) uint8
        return {"pixels": (pixels.transpose(0, 3, 1, 2) / np.float32(127.5) - 1).astype(np.float32)}

    def passes_on(
        self, feeds: Mapping[str, NDArray[Any]], outputs: Mapping[str, NDArray[Any]], known: Mapping[str, NDArray[Any]]
    ) -> Arrays:
        return {"latents": outputs["mean"] * np.float32(self.scaling_factor)}


class VaeDecoder(_Autoencoder):
    """Latents as the sampling loop has them → finished pixels.

    The scaling factor, the clamp and the rounding are inside: round(clip(decoded / 2 + 0.5, 0, 1) · 255), half to even,
    as diffusers' `VaeImageProcessor.postprocess` and `numpy_to_pil` do.
    """

    sliced: ClassVar[bool] = True
    quantized: ClassVar[bool] = True
    traced: ClassVar[Case] = Case(batch=2, height=16, width=24)
    judged: ClassVar[tuple[Case, ...]] = (
        Case(batch=1, height=16, width=16),
        Case(batch=3, height=17, width=15),
        Case(batch=1, height=41, width=32),
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.decoder, self.post_quant_conv = model.decoder, model.post_quant_conv
        pixels = ("batch", f"{self.factor}*height", f"{self.factor}*width", model.config.out_channels)
        self.inputs = (TensorSpec("latents", "float32", ("batch", self.channels, "height", "width")),)
        self.outputs = (TensorSpec("pixels", "uint8", pixels),)

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents / self.scaling_factor
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        decoded = self.decoder(latents)
        pixels = torch.round((decoded / 2 + 0.5).clamp(0, 1) * 255)  # (B, 3, 8h, 8w)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)

    def sample(self, case: Case, known: Mapping[str, NDArray[Any]], rng: np.random.Generator) -> Arrays:
        return {"latents": tiled(known["latents"], case.batch, case.height, case.width)}

    def calibrate(
        self, run: Callable[[Arrays], Arrays], known: Mapping[str, NDArray[Any]], quantizing: QuantizationOptions
    ) -> Arrays:
        """What the denoiser's runs ended with, a picture at a time."""
        for latents in known["denoised"]:
            run({"latents": latents[np.newaxis]})
        return {}

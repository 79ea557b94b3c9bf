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

from latentrt.bundle.tensors import TensorSpec
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.module import Arrays, ComponentModule, Shapes
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["VaeDecoder", "VaeEncoder"]


class _Autoencoder(ComponentModule):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.downscale: int = 2 ** (len(model.config.block_out_channels) - 1)
        self.scale: float = model.config.scaling_factor
        self.shift: float = model.config.shift_factor or 0.0
        self.channels: int = model.config.latent_channels

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        return cls(load_pretrained(AutoencoderKL, checkpoint / "vae", variant))

    def canonical_name(self, parameter: str) -> str:
        return parameter


class VaeEncoder(_Autoencoder):
    """Pixels in −1 … 1 → mean and log-variance of the latent distribution, before scale and shift.

    The log-variance is clamped to −30 … 20, as in `DiagonalGaussianDistribution` of diffusers.
    """

    trace_shapes: ClassVar[Shapes] = {"batch": 2, "height": 16, "width": 24}
    gate_shapes: ClassVar[tuple[Shapes, ...]] = (
        {"batch": 1, "height": 16, "width": 16},
        {"batch": 2, "height": 17, "width": 15},
        {"batch": 1, "height": 32, "width": 40},
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.encoder, self.quant_conv = model.encoder, model.quant_conv
        latents = ("batch", self.channels, "height", "width")
        pixels = ("batch", model.config.in_channels, f"{self.downscale}*height", f"{self.downscale}*width")
        self.inputs = (TensorSpec("pixels", "float32", pixels),)
        self.outputs = (TensorSpec("mean", "float32", latents), TensorSpec("logvar", "float32", latents))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = torch.chunk(moments, 2, dim=1)
        return mean, torch.clamp(logvar, -30.0, 20.0)


class VaeDecoder(_Autoencoder):
    """Latents in the scale of the sampling loop → finished pixels.

    Scale, shift, clamp and rounding are inside: round(clip(decoded / 2 + 0.5, 0, 1) · 255), half to even, as diffusers'
    `VaeImageProcessor.postprocess` and `numpy_to_pil` do.
    """

    is_sliced: ClassVar[bool] = True
    is_quantized: ClassVar[bool] = True
    trace_shapes: ClassVar[Shapes] = {"batch": 2, "height": 16, "width": 24}
    gate_shapes: ClassVar[tuple[Shapes, ...]] = (
        {"batch": 1, "height": 16, "width": 16},
        {"batch": 3, "height": 17, "width": 15},
        {"batch": 1, "height": 41, "width": 32},
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.decoder, self.post_quant_conv = model.decoder, model.post_quant_conv
        pixels = ("batch", f"{self.downscale}*height", f"{self.downscale}*width", model.config.out_channels)
        self.inputs = (TensorSpec("latents", "float32", ("batch", self.channels, "height", "width")),)
        self.outputs = (TensorSpec("pixels", "uint8", pixels),)

    def forward(self, latents: Tensor) -> Tensor:
        latents = latents / self.scale
        if self.shift:
            latents = latents + self.shift
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        decoded = self.decoder(latents)
        pixels = torch.round((decoded / 2 + 0.5).clamp(0, 1) * 255)  # (B, 3, 8h, 8w)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)

    def calibrate(
        self, run: Callable[[Arrays], Arrays], gate_inputs: Mapping[str, NDArray[Any]], options: QuantizationOptions
    ) -> Arrays:
        """Decode the last latents of the denoiser's calibration runs, one image at a time.

        A denoiser that is not quantised has no such runs; encoded images take their place.
        """
        for latents in gate_inputs.get("denoised", gate_inputs["latents"]):
            run({"latents": latents[np.newaxis]})
        return {}

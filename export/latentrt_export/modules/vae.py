"""The autoencoder as two traceable modules: pixels → latents, latents → finished pixels.

Three classes of diffusers: `AutoencoderKL`, whose encoder returns a distribution; `AsymmetricAutoencoderKL`, whose
decoder is larger; and `AutoencoderTiny` (madebyollin/taesd), whose encoder returns the latents themselves, and whose
decoder also serves for previews.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers import AsymmetricAutoencoderKL, AutoencoderKL, AutoencoderTiny
from numpy.typing import NDArray
from torch import Tensor

from latentrt.bundle.tensors import TensorSpec
from latentrt_export.checkpoints.checkpoint import find_own_folder
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.module import Arrays, ComponentModule, Shapes
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["AsymmetricVaeDecoder", "AsymmetricVaeEncoder", "TinyDecoder", "TinyEncoder", "VaeDecoder", "VaeEncoder"]


class _VaeModule(ComponentModule):
    """The encoder or the decoder of an autoencoder; its weights have their names in the class `library_class`."""

    trace_shapes: ClassVar[Shapes] = {"batch": 2, "height": 16, "width": 24}
    library_class: ClassVar[Any]

    @classmethod
    def load(cls, checkpoint: Path, variant: str | None) -> Self:
        return cls(load_pretrained(cls.library_class, find_own_folder(checkpoint, "vae"), variant))

    def canonical_name(self, parameter: str) -> str:
        return parameter


class _Encoder(_VaeModule):
    """Pixels in −1 … 1 → latents before the scale."""

    gate_shapes: ClassVar[tuple[Shapes, ...]] = (
        {"batch": 1, "height": 16, "width": 16},
        {"batch": 2, "height": 17, "width": 15},
        {"batch": 1, "height": 32, "width": 40},
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.encoder = model.encoder
        # diffusers registers `block_out_channels` for every class, and computes the same from it.
        downscale = 2 ** (len(config.block_out_channels) - 1)
        pixels = ("batch", config.in_channels, f"{downscale}*height", f"{downscale}*width")
        self.inputs = (TensorSpec("pixels", "float32", pixels),)
        self.outputs = (TensorSpec("mean", "float32", ("batch", config.latent_channels, "height", "width")),)


class VaeEncoder(_Encoder):
    """Pixels in −1 … 1 → mean and log-variance of the latent distribution, before the scale.

    The log-variance is clamped to −30 … 20, as in `DiagonalGaussianDistribution` of diffusers.
    """

    library_class: ClassVar[Any] = AutoencoderKL

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.quant_conv = model.quant_conv
        (mean,) = self.outputs
        self.outputs = (mean, TensorSpec("logvar", mean.dtype, mean.shape))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = torch.chunk(moments, 2, dim=1)
        return mean, torch.clamp(logvar, -30.0, 20.0)


class AsymmetricVaeEncoder(VaeEncoder):
    """The encoder of `AsymmetricAutoencoderKL`, which is that of `AutoencoderKL`."""

    library_class: ClassVar[Any] = AsymmetricAutoencoderKL


class TinyEncoder(_Encoder):
    """Pixels in −1 … 1 → the latents, which are not a distribution."""

    library_class: ClassVar[Any] = AutoencoderTiny

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder(pixels)  # type: ignore[no-any-return]


class _Decoder(_VaeModule):
    """Latents in the scale of the sampling loop → finished pixels.

    Scale, clamp and rounding are inside: round(clip(decoded / 2 + 0.5, 0, 1) · 255), half to even, as diffusers'
    `VaeImageProcessor.postprocess` and `numpy_to_pil` do. diffusers' pipelines of this family apply no `shift_factor`.
    """

    gate_shapes: ClassVar[tuple[Shapes, ...]] = (
        {"batch": 1, "height": 16, "width": 16},
        {"batch": 3, "height": 17, "width": 15},
        {"batch": 1, "height": 41, "width": 32},
    )

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.decoder = model.decoder
        self.scale: float = config.scaling_factor
        downscale = 2 ** (len(config.block_out_channels) - 1)
        pixels = ("batch", f"{downscale}*height", f"{downscale}*width", config.out_channels)
        self.inputs = (TensorSpec("latents", "float32", ("batch", config.latent_channels, "height", "width")),)
        self.outputs = (TensorSpec("pixels", "uint8", pixels),)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents in the autoencoder's scale to pixels around −1 … 1."""
        return self.decoder(latents)  # type: ignore[no-any-return]

    def forward(self, latents: Tensor) -> Tensor:
        decoded = self.decode(latents / self.scale)
        pixels = torch.round((decoded / 2 + 0.5).clamp(0, 1) * 255)  # (B, 3, 8h, 8w)
        return pixels.permute(0, 2, 3, 1).to(torch.uint8)


class TinyDecoder(_Decoder):
    """The decoder of `AutoencoderTiny`: images similar to the full decoder's, in a fraction of its time."""

    library_class: ClassVar[Any] = AutoencoderTiny


class VaeDecoder(_Decoder):
    """The decoder of `AutoencoderKL`."""

    is_sliced: ClassVar[bool] = True
    is_quantized: ClassVar[bool] = True
    library_class: ClassVar[Any] = AutoencoderKL

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.post_quant_conv = model.post_quant_conv

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents if self.post_quant_conv is None else self.post_quant_conv(latents))

    def calibrate(
        self, run: Callable[[Arrays], Arrays], gate_inputs: Mapping[str, NDArray[Any]], options: QuantizationOptions
    ) -> Arrays:
        """Decode the last latents of the denoiser's calibration runs, one image at a time.

        A denoiser that is not quantised has no such runs; encoded images take their place.
        """
        for latents in gate_inputs.get("denoised", gate_inputs["latents"]):
            run({"latents": latents[np.newaxis]})
        return {}


class AsymmetricVaeDecoder(VaeDecoder):
    """The decoder of `AsymmetricAutoencoderKL` without the condition on a mask, which inpainting alone has."""

    library_class: ClassVar[Any] = AsymmetricAutoencoderKL

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        del self.decoder.condition_encoder

"""The autoencoder as two traceable modules: pixels → latents, latents → finished pixels.

Three classes of diffusers: `AutoencoderKL`, whose encoder returns a distribution; `AsymmetricAutoencoderKL`, whose
decoder is larger and also takes the image and the mask of inpainting; and `AutoencoderTiny` (madebyollin/taesd), whose
encoder returns the latents themselves, and whose decoder also serves for previews.
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
from torch.nn.functional import relu

from latentrt.bundle.gate_inputs import make_image_pixels, make_masks
from latentrt.bundle.tensors import TensorSpec, axis_sizes, sized
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.checkpoint import find_own_folder
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.module import Arrays, ComponentModule, Shapes
from latentrt_export.quantize.options import QuantizationOptions

__all__ = [
    "AsymmetricVaeDecoder",
    "AsymmetricVaeEncoder",
    "InpaintingVaeDecoder",
    "NormalizedVaeDecoder",
    "TinyDecoder",
    "TinyEncoder",
    "VaeDecoder",
    "VaeEncoder",
]


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
        pixels = ("batch", config.in_channels, *_pixel_sides(config))
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
        pixels = ("batch", *_pixel_sides(config), config.out_channels)
        self.inputs = (TensorSpec("latents", "float32", ("batch", config.latent_channels, "height", "width")),)
        self.outputs = (TensorSpec("pixels", "uint8", pixels),)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents in the autoencoder's scale to pixels around −1 … 1."""
        return self.decoder(latents)  # type: ignore[no-any-return]

    def forward(self, latents: Tensor) -> Tensor:
        return self.finish(self.decode(self.denormalize(latents)))

    def denormalize(self, latents: Tensor) -> Tensor:
        """Return latents in the autoencoder's scale, the inverse of `LatentSpace.normalize`."""
        return latents / self.scale

    def finish(self, decoded: Tensor) -> Tensor:
        """Convert decoded pixels around −1 … 1 to 8 bits, channels last."""
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


class NormalizedVaeDecoder(VaeDecoder):
    """The decoder of an `AutoencoderKL` whose latents have a mean and a standard deviation by channel.

    Pipelines of Stable Diffusion XL alone follow `latents_mean` and `latents_std` (Playground v2.5).
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.mean: list[float] = [*model.config.latents_mean]
        self.std: list[float] = [*model.config.latents_std]

    def denormalize(self, latents: Tensor) -> Tensor:
        mean, std = (torch.tensor(each)[None, :, None, None] for each in (self.mean, self.std))
        return latents * std / self.scale + mean


class AsymmetricVaeDecoder(VaeDecoder):
    """The decoder of `AsymmetricAutoencoderKL` without the condition on a mask, which inpainting alone has."""

    library_class: ClassVar[Any] = AsymmetricAutoencoderKL

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        del self.decoder.condition_encoder


class InpaintingVaeDecoder(VaeDecoder):
    """The decoder of `AsymmetricAutoencoderKL` with the image and the mask of inpainting as further inputs.

    `MaskConditionDecoder` of diffusers: before each block, and after the last, its features h become
    h · mask + c · (1 − mask), with c the features of the same size of the image where it is kept. diffusers decodes
    other tasks' latents without this step. A mask of ones has the same effect here, to the bit, as c is finite:
    h · 1 + c · 0 = h.

    Raises:
        CheckpointError: the image has no features of a block's size and channels, with which diffusers fails too.
    """

    is_sliced: ClassVar[bool] = False
    library_class: ClassVar[Any] = AsymmetricAutoencoderKL

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        channels, sides = model.config.out_channels, _pixel_sides(model.config)
        self.inputs = (
            *self.inputs,
            TensorSpec("image", "float32", ("batch", channels, *sides)),
            TensorSpec("mask", "float32", ("batch", 1, *sides)),
        )
        # Channels and pixels per side of the features before each block, and after the last.
        widths = [*reversed(model.config.up_block_out_channels)]
        factors = [1 << level for level in reversed(range(len(widths)))]
        self._levels = [*zip([widths[0], *widths[:-1]], factors, strict=True), (widths[-1], 1)]
        made = _list_condition_levels(self.decoder.condition_encoder)
        if not {*self._levels} <= {*made}:
            raise CheckpointError(
                f"vae: its configuration has up_block_out_channels {model.config.up_block_out_channels}, expected "
                "channels that the features of the image of inpainting have too, such as [c, 2·c, 4·c, 4·c]; pass "
                "another autoencoder as `vae`"
            )
        # The layers after the last one with such features have no effect.
        count = 1 + max(index for index, level in enumerate(made) if level in self._levels)
        self.decoder.condition_encoder.layers = self.decoder.condition_encoder.layers[:count]

    def forward(self, latents: Tensor, image: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        decoder = self.decoder
        features = self._encode_kept(image * (1 - mask))

        def blend(hidden: Tensor, level: tuple[int, int]) -> Tensor:
            # Every n-th value is what `interpolate(mode="nearest")` takes.
            repainted = mask[:, :, :: level[1], :: level[1]]
            return hidden * repainted + features[level] * (1 - repainted)

        hidden = self.denormalize(latents)
        if self.post_quant_conv is not None:
            hidden = self.post_quant_conv(hidden)
        hidden = decoder.mid_block(decoder.conv_in(hidden))
        for block, level in zip(decoder.up_blocks, self._levels, strict=False):
            hidden = block(blend(hidden, level))
        hidden = blend(hidden, self._levels[-1])
        return self.finish(decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(hidden))))

    def _encode_kept(self, pixels: Tensor) -> dict[tuple[int, int], Tensor]:
        """Return the features of the kept image, by channels and pixels per side.

        Where two layers have the same, those of the later one, as in diffusers.
        """
        encoder, features = self.decoder.condition_encoder, {}
        for layer, level in zip(encoder.layers, _list_condition_levels(encoder), strict=True):
            pixels = features[level] = layer(pixels)
            pixels = relu(pixels)
        return features

    def calibrate(
        self, run: Callable[[Arrays], Arrays], gate_inputs: Mapping[str, NDArray[Any]], options: QuantizationOptions
    ) -> Arrays:
        """Decode as `VaeDecoder` does, each image once with a kept region and once without."""

        def run_both(feeds: Arrays) -> Arrays:
            shape = sized(self.inputs[1], axis_sizes(self.inputs[:1], {"latents": feeds["latents"].shape}))
            image, masks = make_image_pixels(shape), make_masks(2, *shape[2:])
            for mask in masks:
                outputs = run({**feeds, "image": image, "mask": mask[np.newaxis]})
            return outputs

        return super().calibrate(run_both, gate_inputs, options)


def _pixel_sides(config: Any) -> tuple[str, str]:
    """Return the height and width of an image in latents, such as `8*height` and `8*width`."""
    # diffusers registers `block_out_channels` for every class, and computes the same from it.
    downscale = 2 ** (len(config.block_out_channels) - 1)
    return f"{downscale}*height", f"{downscale}*width"


def _list_condition_levels(encoder: Any) -> list[tuple[int, int]]:
    """Return channels and pixels per side of the features of each layer of diffusers' `MaskConditionEncoder`."""
    factor, levels = 1, []
    for layer in encoder.layers:
        factor *= layer.stride[0]
        levels.append((layer.out_channels, factor))
    return levels

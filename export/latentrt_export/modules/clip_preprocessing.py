"""CLIP's image preprocessing as a module.

The image is resized as Pillow resizes it (bicubic, antialiased, 8 bits between the passes), cropped and normalised.
All sizes are computed from the input's shape, so one graph takes images of any size. It uses only elementwise
arithmetic and matrix products, so every backend runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentrt_export.checkpoints.preprocessor_config import PreprocessorConfig

__all__ = ["ClipPreprocessing"]

HALF_BITS = 11  # Pillow's weights have 22 fractional bits


class ClipPreprocessing(nn.Module):
    """uint8 [batch, height, width, 3] → float32 [batch, 3, crop height, crop width], as transformers' Pillow processor.

    It has no parameters and computes in float32, also inside a module of another precision. About 2 in 100,000 values
    are one level off: those whose exact sum is within a rounding error of a half.
    """

    def __init__(self, config: PreprocessorConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, pixels: Tensor) -> Tensor:
        config = self.config
        resized = self.resize(pixels)
        mean, std = (torch.tensor(values, dtype=torch.float32).reshape(3, 1, 1) for values in (config.mean, config.std))
        return (resized * config.rescale_factor - mean) / std

    def resize(self, pixels: Tensor) -> Tensor:
        """Resize and crop: uint8 [batch, height, width, 3] → float32 0 … 255 [batch, 3, crop height, crop width].

        The order of the two passes affects the result, because each rounds to 8 bits. Pillow resizes along the rows
        first; since 13.0, along the columns first if the height shrinks by more than twice as much as the width
        (`ImagingResampleInner` in Resample.c). The order depends on the shape alone, but not every backend runs
        branches, so the graph computes both orders and selects one. The four products take a negligible share of the
        classifier's time.
        """
        height, width = pixels.shape[1:3]
        resized_height, resized_width = self._resized_size(height, width)
        crop_height, crop_width = self.config.crop
        planes = pixels.float().permute(0, 3, 1, 2)  # (B, 3, H, W); a cast is the only operation on uint8 in TensorRT
        rows_first = _resample_height(_resample(planes, resized_width, crop_width), resized_height, crop_height)
        columns_first = _resample(_resample_height(planes, resized_height, crop_height), resized_width, crop_width)
        less_width: int = torch.sym_max(2 * (width - resized_width), 0)  # type: ignore[no-untyped-call]
        excess = torch.scalar_tensor(height - resized_height - less_width, dtype=torch.int64)
        return torch.where(excess > 0, columns_first, rows_first)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        # transformers' get_resize_output_image_size: the longer edge is int(size · long / short)
        if isinstance(self.config.resize, tuple):
            return self.config.resize
        short: int = torch.sym_min(height, width)  # type: ignore[no-untyped-call]
        return self.config.resize * height // short, self.config.resize * width // short


def _resample_height(planes: Tensor, resized: int, kept: int) -> Tensor:
    """Resize along the second to last axis: [B, 3, size, n] → [B, 3, kept, n] (`_resample`)."""
    return _resample(planes.transpose(2, 3), resized, kept).transpose(2, 3)


def _resample(planes: Tensor, resized: int, kept: int) -> Tensor:
    """Resize along the last axis as one pass of Pillow does: [B, 3, n, size] → [B, 3, n, kept].

    Only the middle `kept` of the `resized` positions are computed. Pillow sums products of 22-bit fixed-point weights
    and 8-bit pixels in integers. A float32 product has 24 bits, and the factors of a tensor core's TF32 have 11, so
    the weights are split into an upper and a lower half of 11 bits: products and sums are then exact in both.
    """
    size = planes.shape[-1]
    weights = _to_fixed_point(_bicubic_weights(size, resized, first=(resized - kept) // 2, kept=kept))
    upper = torch.floor(weights / 2**HALF_BITS)
    lower = weights - upper * 2**HALF_BITS
    sums = torch.matmul(planes, torch.cat([upper, lower]).transpose(0, 1))  # (B, 3, n, 2 · kept)
    upper_sum, lower_sum = sums[..., :kept], sums[..., kept:]
    # floor(sum / 2²² + ½), from the two halves
    rounded = torch.floor((upper_sum + torch.floor(lower_sum / 2**HALF_BITS)) / 2**HALF_BITS + 0.5)
    return rounded.clamp(0, 255)


def _bicubic_weights(size: int, resized: int, *, first: int, kept: int) -> Tensor:
    """Return Pillow's normalised bicubic weights (`precompute_coeffs` in Resample.c, a = −½): float32 [kept, size].

    Row i has the weights of the input's pixels for position first + i of the resized axis. A pixel's distance from
    it, in units of the kernel, is a ratio of integers, exact wherever the kernel is not zero. The polynomials are
    factored, so that small weights keep their precision. Pillow's xmin and xmax, which skip the zeros of the kernel,
    need no counterpart.
    """
    position = (torch.arange(kept) + first)[:, None]
    pixel = torch.arange(size)[None, :]
    stretch = 2 * torch.sym_max(size, resized)  # type: ignore[no-untyped-call]
    distance = (2 * pixel + 1) * resized - (2 * position + 1) * size
    t = torch.abs(distance.float() / stretch).clamp(max=2)  # 2 is where the kernel ends
    inner = (1 - t) * (1 + t - 1.5 * t * t)
    outer = 0.5 * (1 - t) * (2 - t) * (2 - t)
    weights = torch.where(t < 1, inner, outer)
    return weights / weights.sum(dim=1, keepdim=True)


def _to_fixed_point(weights: Tensor) -> Tensor:
    """Convert weights to units of 2⁻²², rounded to integers stored as float32 (`normalize_coeffs_8bpc`)."""
    return torch.round(weights * 2 ** (2 * HALF_BITS))

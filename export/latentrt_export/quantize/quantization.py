"""How is a layer made int8? The arithmetic of it, in one place.

Weights: symmetric, a scale for each output channel, as both backends multiply them. Activations: uint8, one scale and
zero point for each tensor, since a convolution's sum cannot be scaled by input channel afterwards. A float is
scale · (integer − zero point).

Static layers have weights of 7 bits, −63 … 63. A CPU without VNNI adds two products of uint8 and int8 in 16 bits, where
2 · 255 · 128 does not fit and is cut off in silence, and 2 · 255 · 63 does. A bundle is for every CPU. (ONNX Runtime's
`reduce_range` and NNCF's overflow fix are the same.) Where only weights are int8 nothing is added in 16 bits, and all 8
bits serve.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from latentrt.errors import ExportError

__all__ = ["Layer", "LayerMethod", "Range", "layers_of", "quantized_weight", "weight_limit"]

LayerMethod = Literal["static", "weights", "float32"]
Layer = nn.Linear | nn.Conv2d

_LIMITS: dict[LayerMethod, int] = {"static": 63, "weights": 127}
_LARGEST_UINT8 = 255
# Half of what an int32 holds, as sums of products are added to it.
_LARGEST_BIAS = 2**30


@dataclass(frozen=True)
class Range:
    """What a tensor's values lie in, the zero included, so that padding is exact."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.low) or not math.isfinite(self.high):
            raise ExportError(
                f"found a range of values from {self.low} to {self.high}, expected finite numbers; "
                "the weights overflow, or are damaged"
            )
        object.__setattr__(self, "low", min(self.low, 0.0))
        object.__setattr__(self, "high", max(self.high, 0.0))

    @property
    def scale(self) -> float:
        """Of an integer; 1 for a tensor that is all zero."""
        return (self.high - self.low) / _LARGEST_UINT8 or 1.0

    @property
    def zero_point(self) -> int:
        """The integer that means 0."""
        return min(max(round(-self.low / self.scale), 0), _LARGEST_UINT8)

    def rounded(self, values: Tensor) -> Tensor:
        """The values as they are after having been uint8."""
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, 0, _LARGEST_UINT8)


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """The layers that can be quantised, by torch's name of each."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def weight_limit(method: LayerMethod) -> int:
    """The largest integer of a weight."""
    return _LIMITS[method]


def quantized_weight(layer: Layer, method: LayerMethod, taken: Range | None = None) -> tuple[Tensor, Tensor]:
    """A layer's weight as integers and what they are multiplied by.

    Args:
        layer: its weight is float32 [out, …].
        taken: what a static layer takes. ONNX Runtime adds a convolution's bias as an int32 of the scale of its
            products, and what does not fit there is lost, so a channel's scale is not smaller than that asks for.

    Returns:
        int8 of the same shape, and the float32 scales [out, 1, …].
    """
    limit = weight_limit(method)
    weight, bias = layer.weight.detach(), layer.bias
    largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    scale = torch.where(largest > 0, (largest / limit).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    if taken is not None and isinstance(layer, nn.Conv2d) and bias is not None:
        scale = scale.maximum(bias.detach().abs().reshape(scale.shape) / (taken.scale * _LARGEST_BIAS))
    return torch.round(weight / scale).clamp(-limit, limit).to(torch.int8), scale

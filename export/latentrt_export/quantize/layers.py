"""The arithmetic of an int8 layer: its integers and scales, the ranges of its activations, and a simulation in torch.

Weights are symmetric with one scale per output channel, which both backends multiply with. Activations are uint8 with
one scale and zero point per tensor, because the sum of a convolution cannot be scaled by input channel afterwards. A
float is scale · (integer − zero point).

Static layers have weights of 7 bits, −63 … 63. A CPU without VNNI adds two products of uint8 and int8 in 16 bits, which
saturates silently for 2 · 255 · 128 but not for 2 · 255 · 63, and a bundle has to run on every CPU. (ONNX Runtime's
`reduce_range` and NNCF's overflow fix do the same.) Where only weights are int8, nothing is added in 16 bits, and
weights use all 8 bits.

The range of a tensor is from the smallest to the largest value in any evaluation of the network. The activations of a
denoiser change with the timestep, so a mean of ranges would clip whole timesteps: on the sample model the output is
3.3 % off at worst with extremes, 7.3 % with their means over evaluations (NNCF's default), 30 % with 0.8 of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from latentrt.errors import ExportError
from latentrt_export.modules.streamed import read_parameter

__all__ = [
    "Layer",
    "LayerMethod",
    "LayerRanges",
    "Range",
    "calibrate",
    "find_layers",
    "quantize_weight",
    "simulate_int8",
    "weight_limit",
]

LayerMethod = Literal["static", "weights", "float32"]
Layer = nn.Linear | nn.Conv2d

_LIMITS: dict[LayerMethod, int] = {"static": 63, "weights": 127}
_MAX_UINT8 = 255
# Half of int32's range, because sums of products are added to the bias.
_MAX_BIAS = 2**30


@dataclass(frozen=True)
class Range:
    """The interval of a tensor's values, extended to contain zero so that padding is exact.

    Raises:
        ExportError: an end is not finite.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.low) or not math.isfinite(self.high):
            raise ExportError(
                f"got values from {self.low} to {self.high}, expected finite numbers; "
                "the weights overflow or are damaged"
            )
        object.__setattr__(self, "low", min(self.low, 0.0))
        object.__setattr__(self, "high", max(self.high, 0.0))

    @property
    def scale(self) -> float:
        """The difference between neighbouring integers' values; 1 for a tensor of zeros."""
        return (self.high - self.low) / _MAX_UINT8 or 1.0

    @property
    def zero_point(self) -> int:
        """The integer that represents 0."""
        return min(max(round(-self.low / self.scale), 0), _MAX_UINT8)

    def round(self, values: Tensor) -> Tensor:
        """Convert values to uint8 and back."""
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, 0, _MAX_UINT8)


@dataclass(frozen=True)
class LayerRanges:
    """The ranges of a layer's input and output, and its multiplications per evaluation."""

    input: Range
    output: Range
    multiplications: int


def find_layers(module: nn.Module) -> dict[str, Layer]:
    """Find the layers that can be quantised, by their names in torch."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def weight_limit(method: LayerMethod) -> int:
    """Return the largest integer of a weight."""
    return _LIMITS[method]


def quantize_weight(layer: Layer, method: LayerMethod, input_range: Range | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a layer's weight.

    Args:
        layer: a layer with a float32 weight [out, …], which is read if it is not loaded.
        input_range: the range of a static layer's input. ONNX Runtime stores a convolution's bias as an int32 in units
            of the products' scale, which can overflow, so each channel's scale is at least as large as its bias
            requires.

    Returns:
        The weight as int8 of the same shape, and its scales, float32 [out, 1, …].
    """
    limit = weight_limit(method)
    weight, bias = read_parameter(layer.weight), layer.bias
    largest = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True)
    scale = torch.where(largest > 0, (largest / limit).clamp_min(torch.finfo(torch.float32).tiny), 1.0)
    if input_range is not None and isinstance(layer, nn.Conv2d) and bias is not None:
        scale = scale.maximum(read_parameter(bias).abs().reshape(scale.shape) / (input_range.scale * _MAX_BIAS))
    return torch.round(weight / scale).clamp(-limit, limit).to(torch.int8), scale


# Calibration


@dataclass
class _Extremes:
    """The smallest and largest values of a layer's inputs and outputs, one pair per evaluation."""

    inputs: list[tuple[float, float]] = field(default_factory=list)
    outputs: list[tuple[float, float]] = field(default_factory=list)
    multiplications: int = 0


def calibrate(layers: Mapping[str, Layer], run: Callable[[], Any]) -> dict[str, LayerRanges]:
    """Measure the ranges of layers while their network runs.

    Args:
        layers: the layers by name. Layers that are never evaluated have no ranges in the result.
        run: evaluates the network on representative inputs.
    """
    seen = {name: _Extremes() for name in layers}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(_record_in(seen[name])).remove)
        run()
    return {
        name: LayerRanges(_union(each.inputs), _union(each.outputs), each.multiplications)
        for name, each in seen.items()
        if each.inputs
    }


def _record_in(seen: _Extremes) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs.append(_extremes(inputs[0]))
        seen.outputs.append(_extremes(output))
        weight: Any = layer.weight
        seen.multiplications = output.numel() * weight[0].numel()

    return hook


def _extremes(values: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(values)
    return low.item(), high.item()


def _union(extremes: list[tuple[float, float]]) -> Range:
    lows, highs = zip(*extremes, strict=True)
    return Range(float(np.min(lows)), float(np.max(highs)))  # NaN if one of them is, unlike `min` and `max`


# Simulation


@contextmanager
def simulate_int8(
    layers: Mapping[str, Layer], ranges: Mapping[str, LayerRanges], methods: Mapping[str, LayerMethod]
) -> Iterator[None]:
    """Make layers compute in float what an int8 graph computes, inside a `with` block.

    The input of a static layer is rounded, and the output of a static convolution as well: ONNX Runtime multiplies in
    integers only if the result is stored as one (`passes.quantize_layers`).

    Args:
        layers: the layers by name.
        ranges: the ranges of the static layers.
        methods: the method of each layer; layers without one stay as they are.
    """
    with ExitStack() as undo, torch.no_grad():
        for name, method in methods.items():
            if method != "float32":
                _round_weight(layers[name], method, ranges[name].input if method == "static" else None, undo)
            if method == "static":
                _round_activations(layers[name], ranges[name], undo)
        yield


def _round_weight(layer: Layer, method: LayerMethod, input_range: Range | None, undo: ExitStack) -> None:
    """Replace a layer's weight by its rounded values for the time of each evaluation: it may be loaded for that."""
    exact: list[nn.Parameter | None] = []

    def before(layer: nn.Module, inputs: Any) -> None:
        exact.append(layer._parameters["weight"])
        integers, scale = quantize_weight(layer, method, input_range)  # type: ignore[arg-type]  # a layer it is
        layer._parameters["weight"] = nn.Parameter(integers * scale, requires_grad=False)

    def after(layer: nn.Module, inputs: Any, output: Any) -> None:
        restore()

    def restore() -> None:
        if exact:
            layer._parameters["weight"] = exact.pop()

    undo.callback(layer.register_forward_pre_hook(before).remove)
    undo.callback(layer.register_forward_hook(after).remove)
    undo.callback(restore)  # an evaluation may fail between the two


def _round_activations(layer: Layer, ranges: LayerRanges, undo: ExitStack) -> None:
    undo.callback(layer.register_forward_pre_hook(_round_input(ranges)).remove)
    if isinstance(layer, nn.Conv2d):
        undo.callback(layer.register_forward_hook(_round_output(ranges)).remove)


def _round_input(ranges: LayerRanges) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, inputs: (ranges.input.round(inputs[0]), *inputs[1:])


def _round_output(ranges: LayerRanges) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda _, __, output: ranges.output.round(output)

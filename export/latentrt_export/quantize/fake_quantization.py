"""What would a network compute, were some of its layers int8? In torch, by rounding floats as integers would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from latentrt_export.quantize.calibration import LayerRanges
from latentrt_export.quantize.quantization import Layer, LayerMethod, Range, quantized_weight

__all__ = ["fake_quantized"]


@contextmanager
def fake_quantized(
    layers: Mapping[str, Layer], ranges: Mapping[str, LayerRanges], methods: Mapping[str, LayerMethod]
) -> Iterator[None]:
    """Have layers compute as int8 graphs would, for as long as this lasts.

    A static layer's input is rounded, and a convolution's output too: ONNX Runtime multiplies in integers only where
    the result is stored as one (`passes.quantize`).

    Args:
        layers: by name. ranges: of static ones. methods: of those that are to change.
    """
    with ExitStack() as undo, torch.no_grad():
        for name, method in methods.items():
            if method != "float32":
                _round_weight(layers[name], method, ranges[name].input if method == "static" else None, undo)
            if method == "static":
                _round_activations(layers[name], ranges[name], undo)
        yield


def _round_weight(layer: Layer, method: LayerMethod, taken: Range | None, undo: ExitStack) -> None:
    exact = layer.weight.data
    integers, scale = quantized_weight(layer, method, taken)
    layer.weight.data = integers * scale
    undo.callback(setattr, layer.weight, "data", exact)


def _round_activations(layer: Layer, ranges: LayerRanges, undo: ExitStack) -> None:
    undo.callback(layer.register_forward_pre_hook(_before(ranges)).remove)
    if isinstance(layer, nn.Conv2d):
        undo.callback(layer.register_forward_hook(_behind(ranges)).remove)


def _before(ranges: LayerRanges) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _, inputs: (ranges.input.rounded(inputs[0]), *inputs[1:])


def _behind(ranges: LayerRanges) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda _, __, output: ranges.output.rounded(output)

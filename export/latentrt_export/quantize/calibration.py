"""Which values do a network's layers meet? Seen by hooks while the network does what it will be used for.

The range of a tensor is from the smallest to the largest value seen in any evaluation of the network. What a denoiser's
layers meet changes with the timestep, so that a range of means cuts off whole timesteps: on the sample model the output
is 3.3 % off at worst with extremes, 7.3 % with their means over evaluations (NNCF's default), 30 % with 0.8 of those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from latentrt_export.quantize.quantization import Layer, Range

__all__ = ["LayerRanges", "calibrate"]


@dataclass(frozen=True)
class LayerRanges:
    """What a layer takes and gives, and how many multiplications that is in an evaluation."""

    input: Range
    output: Range
    multiplications: int


@dataclass
class _Seen:
    inputs: list[tuple[float, float]] = field(default_factory=list)
    outputs: list[tuple[float, float]] = field(default_factory=list)
    multiplications: int = 0


def calibrate(layers: Mapping[str, Layer], run: Callable[[], Any]) -> dict[str, LayerRanges]:
    """Watch layers while something runs their network.

    Args:
        layers: by name. One that is never reached has no ranges.
        run: evaluates the network, often enough and on what it is for.
    """
    seen = {name: _Seen() for name in layers}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(_watching(seen[name])).remove)
        run()
    return {name: _ranges(each) for name, each in seen.items() if each.inputs}


def _watching(seen: _Seen) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.inputs.append(_extremes(inputs[0]))
        seen.outputs.append(_extremes(output))
        weight: Any = layer.weight
        seen.multiplications = output.numel() * weight[0].numel()

    return hook


def _extremes(values: Tensor) -> tuple[float, float]:
    low, high = torch.aminmax(values)
    return low.item(), high.item()


def _ranges(seen: _Seen) -> LayerRanges:
    return LayerRanges(_whole(seen.inputs), _whole(seen.outputs), seen.multiplications)


def _whole(extremes: list[tuple[float, float]]) -> Range:
    lows, highs = zip(*extremes, strict=True)
    return Range(min(lows), max(highs))

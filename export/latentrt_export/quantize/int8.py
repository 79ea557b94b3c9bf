"""How is a submodule quantised: calibrated, ranked, and its layers stored?

Everything here is torch, before a graph is written: what `passes.quantize` then does to the graph is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from latentrt.bundle.gate import difference
from latentrt.bundle.manifest import Quantization
from latentrt_export.gates.verify import rms_bound
from latentrt_export.graphs.parts import Run
from latentrt_export.modules.module import Arrays, ComponentModule
from latentrt_export.quantize.calibration import LayerRanges, calibrate
from latentrt_export.quantize.fake_quantization import fake_quantized
from latentrt_export.quantize.quantization import (
    Layer,
    LayerMethod,
    Range,
    layers_of,
    quantized_weight,
    weight_limit,
)
from latentrt_export.quantize.quantization_options import Quantizing
from latentrt_export.quantize.sensitivity import Choice, choose

__all__ = ["Plan", "plan_int8"]

# Where every layer is asked for, one of the sets of inputs has to do: it is small, and of a denoiser it has rows of an
# early, a middle and a late timestep.
_SMALL = 1


@dataclass(frozen=True)
class Plan:
    """What each layer becomes.

    Attributes:
        record: as the manifest has it; layers by their canonical names.
        tensors: what is stored in place of a layer's weight and beside it.
    """

    record: Quantization
    tensors: dict[str, Tensor]

    @property
    def methods(self) -> dict[str, LayerMethod]:
        return {name: layer.method for name, layer in self.record.layers.items()}


def plan_int8(
    submodule: ComponentModule,
    quantizing: Quantizing,
    known: Mapping[str, NDArray[Any]],
    trials: Iterable[Run],
    phase: Callable[[str], None],
) -> tuple[Plan, Arrays]:
    """Calibrate and rank a submodule's layers, and decide what each becomes.

    Args:
        submodule: loaded, in float32; it is as it was afterwards.
        quantizing: what is asked for.
        known: what earlier submodules made.
        trials: the inputs that the graph will be judged on, and what torch makes of them. What torch chose on the way
            is chosen in every trial, as the graph will be told it too.
        phase: told what is being done.

    Returns:
        The plan, and what later submodules may use as inputs: what the calibrating runs ended with.
    """
    trials = tuple(trials)
    static, learnt, evaluations = quantizing.method == "static", Arrays(), 0

    def run(feeds: Arrays) -> Arrays:
        nonlocal evaluations
        evaluations += 1
        phase(f"calibrating, evaluation {evaluations}")
        return submodule.torch_outputs(feeds)

    def use() -> None:
        if static:
            learnt.update(submodule.calibrate(run, known, quantizing))
        else:  # there is nothing to learn but which layers there are, and how large
            submodule.torch_outputs(trials[_SMALL].feeds)

    layers = layers_of(submodule)
    ranges = calibrate(layers, use)
    layers = {name: layer for name, layer in layers.items() if name in ranges}

    def error(methods: Mapping[str, LayerMethod], judged: Iterable[Run]) -> float:
        with fake_quantized(layers, ranges, methods):
            return max(_error(submodule, run) for run in judged)

    choice = choose(
        quantizing.method,
        {name: ranges[name].multiplications for name in layers},
        alone=lambda methods: error(methods, trials[_SMALL : _SMALL + 1]),
        together=lambda methods: error(methods, trials),
        bound=rms_bound(quantizing.method),
        told=phase,
    )
    return _planned(submodule, quantizing, layers, ranges, choice, evaluations), learnt


def _planned(
    submodule: ComponentModule,
    quantizing: Quantizing,
    layers: Mapping[str, Layer],
    ranges: Mapping[str, LayerRanges],
    choice: Choice,
    evaluations: int,
) -> Plan:
    """The record of what was chosen, by canonical names, and the tensors that it makes."""
    canonical = {name: submodule.canonical_name(f"{name}.weight").removesuffix(".weight") for name in layers}
    tensors: dict[str, Tensor] = {}
    for name, method in choice.methods.items():
        if method != "float32":
            tensors.update(_stored(canonical[name], layers[name], method, ranges[name]))
    record = Quantization(
        method=quantizing.method,
        weight_bits=weight_limit(quantizing.method).bit_length() + 1,
        steps=quantizing.steps if quantizing.method == "static" else 0,
        evaluations=evaluations,
        layers={canonical[name]: layer for name, layer in choice.layers.items()},
    )
    return Plan(record, tensors)


def _error(submodule: ComponentModule, run: Run) -> float:
    with submodule.forced(run.choices):
        found = submodule.torch_outputs(run.feeds)
    return max(difference(reference, found[output], "rms") for output, reference in run.outputs.items())


def _stored(name: str, layer: Layer, method: LayerMethod, ranges: LayerRanges) -> dict[str, Tensor]:
    integers, scale = quantized_weight(layer, method, ranges.input if method == "static" else None)
    if method == "weights":
        return {f"{name}.weight": integers, f"{name}.weight_scale": scale}
    tensors = {f"{name}.weight": integers, f"{name}.weight_scale": scale.flatten()}
    tensors |= _range(f"{name}.input", ranges.input)
    return tensors | _range(f"{name}.output", ranges.output) if isinstance(layer, nn.Conv2d) else tensors


def _range(name: str, values: Range) -> dict[str, Tensor]:
    return {
        f"{name}_scale": torch.tensor(np.float32(values.scale)),
        f"{name}_zero_point": torch.tensor(values.zero_point, dtype=torch.uint8),
    }

"""Plans the quantisation of a component: calibrates its layers, chooses a method for each, and computes its tensors.

All of this runs in torch before a graph is written; `simulate_int8` has the same effect as `passes.quantize_layers`.

Methods are chosen by each layer's effect on the network's output:

1. Each layer is quantised alone and the network is run: its error is the relative RMS error of the output.
2. Layers are excluded in the order of their error² per multiplication that quantising them would save, since the errors
   of different layers add up as squares.
3. At least the first layers are excluded, up to `_FREE_SHARE` of all multiplications, which costs next to no time; then
   as many as it takes for all others together to meet the bound, found by bisection.
4. A layer excluded from the static method still gets int8 weights if most of its error came from rounding activations.
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
from latentrt.bundle.manifest import Quantization, QuantizationMethod, QuantizedLayer
from latentrt.errors import ExportError
from latentrt_export.gates.verify import Run, rms_bound
from latentrt_export.modules.module import Arrays, ComponentModule
from latentrt_export.quantize.layers import (
    Layer,
    LayerMethod,
    LayerRanges,
    Range,
    calibrate,
    find_layers,
    quantize_weight,
    simulate_int8,
    weight_limit,
)
from latentrt_export.quantize.options import QuantizationOptions

__all__ = ["Int8Plan", "LayerPlan", "choose_methods", "plan_int8"]

# The index of the run that measures every layer alone: a small one, whose rows have an early, a middle and a late
# timestep in a denoiser.
_SMALL_RUN = 1
_FREE_SHARE = 0.02
# Used share of the bound: the simulation ignores the order of sums and the rounding of other weights to half.
_MARGIN = 0.9
# An excluded layer's weights are int8 if that causes at most this share of its error (a sixteenth of the square).
_WEIGHTS_SHARE = 0.25

Methods = Mapping[str, LayerMethod]


@dataclass(frozen=True)
class Int8Plan:
    """The quantisation of a component.

    Attributes:
        record: the record for the manifest; layers by their canonical names.
        tensors: the tensors to store in place of the layers' weights and in addition to them, by name.
    """

    record: Quantization
    tensors: dict[str, Tensor]

    @property
    def methods(self) -> dict[str, LayerMethod]:
        """The method of each layer."""
        return {name: layer.method for name, layer in self.record.layers.items()}


@dataclass(frozen=True)
class LayerPlan:
    """The method of each layer, with the measurements that decided it."""

    layers: dict[str, QuantizedLayer]

    @property
    def methods(self) -> dict[str, LayerMethod]:
        """The method of each layer."""
        return {name: layer.method for name, layer in self.layers.items()}


def plan_int8(
    module: ComponentModule,
    options: QuantizationOptions,
    gate_inputs: Mapping[str, NDArray[Any]],
    runs: Iterable[Run],
    notify: Callable[[str], None],
) -> tuple[Int8Plan, Arrays]:
    """Calibrate a component's layers and choose the method of each.

    Args:
        module: the loaded module, in float32; unchanged afterwards.
        options: the method, and the options of calibration.
        gate_inputs: arrays produced by earlier components.
        runs: the inputs on which the graph will be compared, with torch's outputs. Torch's token matchings are forced
            in every evaluation, as they will be in the graph.
        notify: called with a description of each step that begins.

    Returns:
        The plan, and arrays for later components: the results of the calibration runs.

    Raises:
        ExportError: an activation or an output is not finite.
    """
    runs = tuple(runs)
    static, produced, evaluations = options.method == "static", Arrays(), 0

    def evaluate(feeds: Arrays) -> Arrays:
        nonlocal evaluations
        evaluations += 1
        notify(f"calibrating, evaluation {evaluations}")
        return module.torch_outputs(feeds)

    def run_network() -> None:
        if static:
            produced.update(module.calibrate(evaluate, gate_inputs, options))
        else:  # ranges are not needed, only which layers are evaluated and their multiplications
            module.torch_outputs(runs[_SMALL_RUN].feeds)

    layers = find_layers(module)
    ranges = calibrate(layers, run_network)
    layers = {name: layer for name, layer in layers.items() if name in ranges}

    def measure_error(methods: Methods, compared: Iterable[Run]) -> float:
        with simulate_int8(layers, ranges, methods):
            errors = [_measure_error(module, run) for run in compared]
        if not np.isfinite(errors).all():
            raise ExportError(
                f"{len(methods)} quantised layers, the first is {next(iter(methods), None)}, make outputs that are not "
                "finite; expected finite ones. No bundle was written; use `precision='float16'`"
            )
        return max(errors)

    plan = choose_methods(
        options.method,
        {name: ranges[name].multiplications for name in layers},
        layer_error=lambda methods: measure_error(methods, runs[_SMALL_RUN : _SMALL_RUN + 1]),
        total_error=lambda methods: measure_error(methods, runs),
        bound=rms_bound(options.method),
        notify=notify,
    )
    return _build_plan(module, options, layers, ranges, plan, evaluations), produced


def _build_plan(
    module: ComponentModule,
    options: QuantizationOptions,
    layers: Mapping[str, Layer],
    ranges: Mapping[str, LayerRanges],
    plan: LayerPlan,
    evaluations: int,
) -> Int8Plan:
    canonical = {name: module.canonical_name(f"{name}.weight").removesuffix(".weight") for name in layers}
    tensors: dict[str, Tensor] = {}
    for name, method in plan.methods.items():
        if method != "float32":
            tensors.update(_quantize_layer(canonical[name], layers[name], method, ranges[name]))
    record = Quantization(
        method=options.method,
        weight_bits=weight_limit(options.method).bit_length() + 1,
        steps=options.steps if options.method == "static" else 0,
        evaluations=evaluations,
        layers={canonical[name]: layer for name, layer in plan.layers.items()},
    )
    return Int8Plan(record, tensors)


def _measure_error(module: ComponentModule, run: Run) -> float:
    with module.forced(run.forced):
        found = module.torch_outputs(run.feeds)
    errors = [difference(reference, found.get(output), "rms") for output, reference in run.outputs.items()]
    return float(np.max(errors))  # NaN if one of them is, unlike `max`


def _quantize_layer(name: str, layer: Layer, method: LayerMethod, ranges: LayerRanges) -> dict[str, Tensor]:
    integers, scale = quantize_weight(layer, method, ranges.input if method == "static" else None)
    if method == "weights":
        return {f"{name}.weight": integers, f"{name}.weight_scale": scale}
    tensors = {f"{name}.weight": integers, f"{name}.weight_scale": scale.flatten()}
    tensors |= _store_range(f"{name}.input", ranges.input)
    return tensors | _store_range(f"{name}.output", ranges.output) if isinstance(layer, nn.Conv2d) else tensors


def _store_range(name: str, values: Range) -> dict[str, Tensor]:
    return {
        f"{name}_scale": torch.tensor(np.float32(values.scale)),
        f"{name}_zero_point": torch.tensor(values.zero_point, dtype=torch.uint8),
    }


def choose_methods(
    method: QuantizationMethod,
    multiplications: Mapping[str, int],
    *,
    layer_error: Callable[[Methods], float],
    total_error: Callable[[Methods], float],
    bound: float,
    notify: Callable[[str], None],
) -> LayerPlan:
    """Choose each layer's method.

    Args:
        method: the method of the layers whose error stays low enough.
        multiplications: the number of multiplications of each layer per evaluation.
        layer_error: returns the network's error on few inputs with these layers quantised; called for every layer.
        total_error: the same on all inputs on which the graph will be compared.
        bound: the largest error that the gate accepts.
        notify: called with a description of each step that begins.
    """
    total = sum(multiplications.values())
    errors: dict[str, float] = {}
    for index, name in enumerate(multiplications):
        notify(f"measuring the error of each layer, {index + 1} of {len(multiplications)}")
        errors[name] = layer_error({name: method})
    order = sorted(errors, key=lambda name: errors[name] ** 2 / max(multiplications[name], 1), reverse=True)
    fewest = _count_free(order, multiplications, total * _FREE_SHARE)
    milder: dict[str, LayerMethod] = {}

    def assign(excluded: int) -> dict[str, LayerMethod]:
        for name in order[:excluded]:
            if name not in milder:
                milder[name] = _find_milder(method, name, errors[name], layer_error)
        return {name: milder[name] if index < excluded else method for index, name in enumerate(order)}

    low, high = fewest, len(order)
    while low < high:
        notify(f"choosing layers to exclude, {low} to {high} of {len(order)}")
        middle = _next_guess(low, high, fewest)
        if total_error(assign(middle)) <= bound * _MARGIN:
            high = middle
        else:
            low = middle + 1
    methods = assign(low)
    return LayerPlan(
        {
            name: QuantizedLayer(method=methods[name], error=errors[name], share=multiplications[name] / total)
            for name in multiplications
        }
    )


def _count_free(order: list[str], multiplications: Mapping[str, int], budget: float) -> int:
    """Count the first layers that together have at most `budget` multiplications."""
    spent = 0
    for count, name in enumerate(order):
        spent += multiplications[name]
        if spent > budget:
            return count
    return len(order)


def _next_guess(low: int, high: int, fewest: int) -> int:
    """Return the number to try next, from `low` upwards in small steps, because usually few layers are excluded."""
    return low if low == fewest else (low + min(high, 2 * low)) // 2


def _find_milder(
    method: QuantizationMethod, name: str, error: float, layer_error: Callable[[Methods], float]
) -> LayerMethod:
    """Return the method of an excluded layer."""
    if method == "weights":
        return "float32"
    return "weights" if layer_error({name: "weights"}) <= error * _WEIGHTS_SHARE else "float32"

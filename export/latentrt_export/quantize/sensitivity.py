"""Which layers are quantised, and which are kept? Decided by what each costs, measured at the network's output.

1. Each layer alone is quantised, and the network is run: its error is the relative RMS error of the output.
2. Layers are kept in the order of their error² for each multiplication that quantising them would save; errors of
   different layers add up as squares.
3. Kept are at least the first ones, up to `_FREE_SHARE` of the multiplications, which costs next to no time; then as
   many as it takes for all the rest together to be within the bound, found by bisection.
4. Of a layer that is kept from the static method, the weights are int8 all the same where it was the activations'
   rounding that hurt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from latentrt.bundle.manifest import QuantizationMethod, QuantizedLayer
from latentrt_export.quantize.quantization import LayerMethod

__all__ = ["Choice", "choose"]

_FREE_SHARE = 0.02
# Of the bound, for what torch's simulation leaves out: the order of sums, the rounding of float leftovers to half.
_MARGIN = 0.9
# A kept layer's weights are int8 where that does at most so much of the harm (of its square: a sixteenth).
_WEIGHTS_HARM = 0.25

Methods = Mapping[str, LayerMethod]


@dataclass(frozen=True)
class Choice:
    """What was chosen for each layer, and what it was chosen by."""

    layers: dict[str, QuantizedLayer]

    @property
    def methods(self) -> dict[str, LayerMethod]:
        return {name: layer.method for name, layer in self.layers.items()}


def choose(
    method: QuantizationMethod,
    multiplications: Mapping[str, int],
    *,
    alone: Callable[[Methods], float],
    together: Callable[[Methods], float],
    bound: float,
    told: Callable[[str], None],
) -> Choice:
    """Choose each layer's method.

    Args:
        method: of those that can bear it.
        multiplications: of each layer.
        alone: the error of the network with these layers quantised, on few inputs: it is asked for every layer.
        together: the same on all inputs that the graph will be judged on.
        bound: the largest error that will pass.
        told: what is being done.
    """
    total = sum(multiplications.values())
    errors: dict[str, float] = {}
    for index, name in enumerate(multiplications):
        told(f"measuring what a layer costs, {index + 1} of {len(multiplications)}")
        errors[name] = alone({name: method})
    order = sorted(errors, key=lambda name: errors[name] ** 2 / max(multiplications[name], 1), reverse=True)
    least = _free(order, multiplications, total * _FREE_SHARE)
    softer: dict[str, LayerMethod] = {}

    def methods(kept: int) -> dict[str, LayerMethod]:
        for name in order[:kept]:
            if name not in softer:
                softer[name] = _kept_as(method, name, errors[name], alone)
        return {name: softer[name] if index < kept else method for index, name in enumerate(order)}

    low, high = least, len(order)
    while low < high:
        told(f"choosing layers to keep, {low} to {high} of {len(order)}")
        middle = _next(low, high, least)
        if together(methods(middle)) <= bound * _MARGIN:
            high = middle
        else:
            low = middle + 1
    chosen = methods(low)
    return Choice(
        {
            name: QuantizedLayer(method=chosen[name], error=errors[name], share=multiplications[name] / total)
            for name in multiplications
        }
    )


def _free(order: list[str], multiplications: Mapping[str, int], budget: float) -> int:
    """How many of the first ones are within a number of multiplications."""
    spent = 0
    for count, name in enumerate(order):
        spent += multiplications[name]
        if spent > budget:
            return count
    return len(order)


def _next(low: int, high: int, least: int) -> int:
    """Few layers are kept as a rule, so the least is tried first, and then a little more."""
    return low if low == least else (low + min(high, 2 * low)) // 2


def _kept_as(method: QuantizationMethod, name: str, error: float, alone: Callable[[Methods], float]) -> LayerMethod:
    if method == "weights":
        return "float32"
    return "weights" if alone({name: "weights"}) <= error * _WEIGHTS_HARM else "float32"

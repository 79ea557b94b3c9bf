"""What did quantisation keep from int8, and why? In words, for whoever exports or inspects a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from latentrt.bundle.manifest import Component, Quantization, QuantizedLayer

__all__ = ["quantization_words"]

_MOST_SHOWN = 10
_KEPT_AS = {"weights": "int8 weights", "float32": "float"}
_METHODS = {"static": "int8 weights and activations", "weights": "int8 weights"}


def quantization_words(components: Mapping[str, Component]) -> Iterator[str]:
    """Lines on each int8 graph: how many layers compute how, and the costliest ones that were kept."""
    for name, component in components.items():
        graph = component.graphs.get("int8")
        if graph is not None and graph.quantization is not None:
            yield from _words(name, graph.quantization)


def _words(name: str, quantization: Quantization) -> Iterator[str]:
    layers = quantization.layers
    kept = {layer: found for layer, found in layers.items() if found.method != quantization.method}
    share = 1 - sum(found.share for found in kept.values())
    yield (
        f"{name}: {len(layers) - len(kept)} of {len(layers)} layers, {share:.1%} of the multiplications, have "
        f"{_METHODS[quantization.method]} of {quantization.weight_bits} bits{_calibrated(quantization)}"
    )
    if kept:
        yield f"  kept, by what each alone would cost the output (RMS): {', '.join(_costliest(kept))}"


def _calibrated(quantization: Quantization) -> str:
    if not quantization.evaluations:
        return ""
    return f"; calibrated in {quantization.evaluations} evaluations"


def _costliest(kept: Mapping[str, QuantizedLayer]) -> Iterator[str]:
    order = sorted(kept, key=lambda layer: kept[layer].error, reverse=True)
    for layer in order[:_MOST_SHOWN]:
        yield f"{layer} {kept[layer].error:.2%} ({_KEPT_AS[kept[layer].method]})"
    if len(order) > _MOST_SHOWN:
        yield f"and {len(order) - _MOST_SHOWN} more"

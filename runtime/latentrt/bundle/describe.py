"""Descriptions of a component's parts and quantisation, for `latentrt export` and `latentrt inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from latentrt.bundle.manifest import Component, GateResult, Part, Precision, Quantization, QuantizedLayer
from latentrt.bundle.tensors import TensorSpec

__all__ = ["PartGroup", "describe_quantization", "group_parts", "nearest_to_bound"]

# The parts of a sliced decode that run before the slices, in order.
_BEFORE_SLICES = ("head", "attention", "neck")
_MAX_LAYERS = 10
_KEPT_AS = {"weights": "int8 weights", "float32": "float"}
_METHODS = {"static": "int8 weights and activations", "weights": "int8 weights"}


@dataclass(frozen=True)
class PartGroup:
    """A row of a table of parts: one part, or several that run one after the other."""

    title: str
    parts: tuple[Part, ...]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Inputs of the first part."""
        return self.parts[0].inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Outputs of the last part."""
        return self.parts[-1].outputs

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Precisions available in every part."""
        return tuple(name for name in self.parts[0].graphs if all(name in part.graphs for part in self.parts))

    def nodes(self, precision: Precision) -> int:
        """Return the number of nodes of all parts together."""
        return sum(part.graphs[precision].nodes for part in self.parts)

    def float32_nodes(self, precision: Precision) -> int:
        """Return the number of nodes that compute in float32 in a float16 graph, of all parts together."""
        return sum(len(part.graphs[precision].float32_nodes) for part in self.parts)

    def gate(self, precision: Precision) -> tuple[GateResult, ...]:
        """Return the gate results of all parts."""
        return tuple(result for part in self.parts for result in part.graphs[precision].gate)


def group_parts(parts: Mapping[str, Part]) -> Iterator[PartGroup]:
    """Yield a denoiser's parts one by one, and all parts of a sliced decoder, from latents to pixels, as one group."""
    for name, part in parts.items():
        if not _slice_order(name):
            yield PartGroup(name, (part,))
    slices = sorted(filter(_slice_order, parts), key=_slice_order)
    if slices:
        yield PartGroup(f"{len(slices)} slices", tuple(parts[name] for name in slices))


def nearest_to_bound(results: tuple[GateResult, ...]) -> GateResult | None:
    """Return the gate result that came nearest to its bound, None if there is none."""
    return max(results, key=lambda gate: gate.value / gate.bound if gate.bound else gate.value, default=None)


def describe_quantization(components: Mapping[str, Component]) -> Iterator[str]:
    """Yield lines on each int8 graph: the number of layers per method, and the costliest layers that were kept."""
    for name, component in components.items():
        graph = component.graphs.get("int8")
        if graph is not None and graph.quantization is not None:
            yield from _describe_layers(name, graph.quantization)


def _slice_order(name: str) -> int:
    """Return the position of a part in a sliced decode, counted from 1; 0 for any other part."""
    if name in _BEFORE_SLICES:
        return _BEFORE_SLICES.index(name) + 1
    kind, _, number = name.partition(".")
    return int(number) + len(_BEFORE_SLICES) + 1 if kind == "slice" else 0


def _describe_layers(name: str, quantization: Quantization) -> Iterator[str]:
    layers = quantization.layers
    kept = {layer: found for layer, found in layers.items() if found.method != quantization.method}
    share = 1 - sum(found.share for found in kept.values())
    yield (
        f"{name}: {len(layers) - len(kept)} of {len(layers)} layers, {share:.1%} of the multiplications, have "
        f"{_METHODS[quantization.method]} of {quantization.weight_bits} bits{_describe_calibration(quantization)}"
    )
    if kept:
        yield f"  kept, by the output error (RMS) of quantising each alone: {', '.join(_costliest(kept))}"


def _describe_calibration(quantization: Quantization) -> str:
    if not quantization.evaluations:
        return ""
    return f"; calibrated in {quantization.evaluations} evaluations"


def _costliest(kept: Mapping[str, QuantizedLayer]) -> Iterator[str]:
    order = sorted(kept, key=lambda layer: kept[layer].error, reverse=True)
    for layer in order[:_MAX_LAYERS]:
        yield f"{layer} {kept[layer].error:.2%} ({_KEPT_AS[kept[layer].method]})"
    if len(order) > _MAX_LAYERS:
        yield f"and {len(order) - _MAX_LAYERS} more"

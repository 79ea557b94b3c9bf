"""Rewrites float32 graphs to half weights or to half arithmetic, and chooses the operations that stay in float32.

A graph is traced once, in float32. From it come both graphs of a float16 bundle: one that computes in half, and one
that computes in float32 from the same half weights, for backends (a CPU) on which half is slower. Nothing is computed
in half to make them.

The half graph follows torch's type promotion: an operation that reads a half weight or a half value computes in half;
an operation that reads neither stays float32 (the sines of a timestep, whose input diffusers keeps in float32; the
preprocessing of the safety classifier, whose input is uint8). The arithmetic that our own modules add around the
checkpoint's (finished pixels, the cosines of the safety classifier, the matching of tokens to merge) stays float32.
Each node whose inputs or outputs come near half's range on real inputs, at either end, stays float32 as well: the
largest value of a tensor must be neither beyond `RANGE_LIMIT` nor subnormal.

A weight that half cannot hold is stored as float32, and the nodes that read it stay float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from latentrt_export.graphs.segments import SegmentedGraph, find_computed
from latentrt_export.modules.module import Arrays, ComponentModule
from latentrt_export.modules.streamed import is_stored_as_half, read_parameter
from latentrt_export.token_merging_ratio import MATCHING

__all__ = [
    "RANGE_LIMIT",
    "SMALLEST_RANGE",
    "compute_in_float32",
    "compute_in_half",
    "measure_ranges",
    "select_float32_nodes",
    "select_float32_weights",
]

# A quarter of half's largest number: two bits of headroom for prompts and images that were not measured.
RANGE_LIMIT = float(np.finfo(np.float16).max) / 4
# Half's smallest normal number, 2⁻¹⁴. A tensor of smaller values has fewer than eleven bits; below 2⁻²⁵ it is zero.
SMALLEST_RANGE = float(np.finfo(np.float16).tiny)
# The largest loss from rounding a weight to half: RMS over the weight's RMS, and of a bias over its layer's largest
# output. Rounding normal numbers loses 2⁻¹² (RMS).
_WEIGHT_LOSS = 2.0**-9

_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
# Inputs that an operator defines as float32 whatever the type of its data: (operator, position).
_ALWAYS_FLOAT = {("Resize", 1), ("Resize", 2)}
# Operators that compute nothing: a Cast is the border itself, and Shape reads a value of any type.
_MOVES = {"Cast", "Shape", "Constant"}


def measure_ranges(
    model: ir.Model, folder: Path, feeds: Sequence[Mapping[str, NDArray[Any]]], weights: Iterable[str]
) -> tuple[dict[str, float], list[Arrays]]:
    """Measure how large the values of a float32 graph get, by running it with two reductions behind every value.

    Args:
        model: the float32 graph; not modified.
        folder: the weights' folder, for temporary files.
        feeds: sets of inputs.
        weights: names of the weights, which are not measured, because they are always stored in half.

    Returns:
        Value → its largest absolute value over all feeds, for inputs, constants and values that depend on inputs; and
        the graph's own outputs for each set of inputs. Negative infinities, which masks contain, are ignored; NaN and
        positive infinities of a node give infinity.
    """
    probed = model.clone()
    names = _add_probes(probed)
    largest = {**_measure_constants(model, set(weights)), **dict.fromkeys(names, 0.0)}
    own = [str(value.name) for value in model.graph.outputs]
    outputs = []
    # In the order of the file, so that a probed value's memory is freed before the next value is computed.
    for feed, results in zip(feeds, SegmentedGraph(probed, folder, file_order=True).run_all(feeds), strict=True):
        seen = {name: _bound(results[f"{name}/ReduceMin"], results[f"{name}/ReduceMax"]) for name in names}
        inputs = {name: _largest(array) for name, array in feed.items() if array.dtype == np.float32}
        for name, value in {**inputs, **seen}.items():
            largest[name] = max(largest.get(name, 0.0), value)
        outputs.append({name: results[name] for name in own})
    return largest, outputs


def _measure_constants(model: ir.Model, weights: set[str]) -> dict[str, float]:
    return {
        name: _largest(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if name not in weights and value.const_value is not None and value.dtype == _FLOAT
    }


def _add_probes(model: ir.Model) -> list[str]:
    computed = find_computed(model)
    probed = [
        (node, value) for node in model.graph for value in node.outputs if value.dtype == _FLOAT and value in computed
    ]
    for node, value in probed:
        for operator in ("ReduceMax", "ReduceMin"):
            probe = ir.node(operator, [value], {"keepdims": 0}, name=f"{value.name}/{operator}")
            probe.outputs[0].name = f"{value.name}/{operator}"
            probe.outputs[0].type, probe.outputs[0].shape = ir.TensorType(_FLOAT), ir.Shape(())
            # Directly behind the value: see `measure_ranges`.
            model.graph.insert_after(node, probe)
            model.graph.outputs.append(probe.outputs[0])
    return [str(value.name) for _, value in probed]


def _bound(low: NDArray[Any], high: NDArray[Any]) -> float:
    """Return the largest absolute value of a tensor with these extremes."""
    if np.isnan(low) or np.isnan(high) or high == np.inf:
        return float("inf")
    return _largest(low, high)


def _largest(*arrays: NDArray[Any]) -> float:
    values = np.concatenate([np.ravel(array) for array in arrays]).astype(np.float64)
    return float(np.abs(values[np.isfinite(values)]).max(initial=0.0))


def _fits_half(largest: float) -> bool:
    """Return whether half holds a tensor with this largest absolute value; zeros it holds exactly."""
    return largest == 0 or SMALLEST_RANGE <= largest <= RANGE_LIMIT


def select_float32_weights(module: ComponentModule, largest_outputs: Mapping[str, float]) -> frozenset[str]:
    """Select the weights that half cannot hold, because they overflow or lose too many bits.

    A bias is added to its layer's output, so its loss counts in proportion to that: a bias of tiny numbers beside
    larger outputs loses nothing that matters. Weights that are half in the checkpoint lose nothing and are not read.

    Args:
        module: the loaded module, in float32.
        largest_outputs: layer → its largest absolute output on the gate's inputs (`gates.activations`).

    Returns:
        The canonical names of these weights.
    """
    found = set()
    for name, parameter in module.named_parameters():
        if is_stored_as_half(parameter):
            continue
        layer, _, kind = name.rpartition(".")
        exact = read_parameter(parameter)
        loss = exact.half().float() - exact
        if kind == "bias" and layer in largest_outputs:
            lost, allowed = float(loss.abs().max()), _WEIGHT_LOSS * largest_outputs[layer]
        else:
            lost, allowed = float(torch.linalg.vector_norm(loss)), _WEIGHT_LOSS * float(torch.linalg.vector_norm(exact))
        if not lost <= allowed:
            found.add(module.canonical_name(name))
    return frozenset(found)


def select_float32_nodes(model: ir.Model, ranges: Mapping[str, float], kept: Collection[str] = ()) -> tuple[str, ...]:
    """Select the nodes that must stay float32: our own arithmetic, those next to a value that half cannot hold, and
    those that read a weight stored as float32, directly or rearranged.

    Args:
        model: the float32 graph, its nodes named by `passes.name_nodes`.
        ranges: value → its largest absolute value (`measure_ranges`).
        kept: names of the weights stored as float32 (`select_float32_weights`).

    Returns:
        The names of the nodes.
    """
    selected, exact = [], set(kept)
    for node in model.graph:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None]
        reads = [value for value in node.inputs if value is not None and str(value.name) in exact]
        if reads and all(value in reads or value.const_value is not None for value in node.inputs if value is not None):
            exact.update(str(value.name) for value in node.outputs)  # the weight itself, transposed or reshaped
        if (
            reads
            or _is_our_own(str(node.name))
            or not all(_fits_half(ranges.get(str(value.name), 0.0)) for value in values)
        ):
            selected.append(str(node.name))
    return tuple(selected)


def compute_in_float32(model: ir.Model, weights: Iterable[str]) -> None:
    """Make a float32 graph read half weights, each through one Cast, which a backend folds at load.

    Args:
        model: the float32 graph; modified.
        weights: names of the initializers that become half.
    """
    first = model.graph[0]
    for name in weights:
        value = model.graph.initializers[name]
        uses = tuple(value.uses())
        cast = _cast(value, _FLOAT, f"{name}/Cast")
        model.graph.insert_before(first, cast)
        for use in uses:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        value.dtype = _HALF


def compute_in_half(
    model: ir.Model,
    weights: Iterable[str],
    *,
    float32_inputs: frozenset[str],
    float32_nodes: Iterable[str],
    ranges: Mapping[str, float],
) -> tuple[str, ...]:
    """Rewrite a float32 graph to compute in half.

    Args:
        model: the float32 graph; modified. Its inputs and outputs stay float32.
        weights: names of the weights that become half; nodes that read others are among `float32_nodes`.
        float32_inputs: inputs whose arithmetic stays float32 until it meets a half value.
        float32_nodes: names of the nodes that stay float32 (`select_float32_nodes`).
        ranges: as in `select_float32_nodes`; a value that half cannot hold is never stored in it.

    Returns:
        The names of the nodes that compute in float32: `float32_nodes`, and those that no half value reaches.
    """
    for name in weights:
        model.graph.initializers[name].dtype = _HALF
    rewrite = _HalfRewrite(model, set(weights), float32_inputs, set(float32_nodes), ranges)
    nodes = tuple(model.graph)
    for node in nodes:
        rewrite.visit(node)
    rewrite.restore_outputs()
    return tuple(str(node.name) for node in nodes if _computes_in_float32(node))


def _computes_in_float32(node: ir.Node) -> bool:
    if node.op_type in _MOVES or not node.inputs:
        return False
    values = [*_data_inputs(node), *node.outputs]
    return any(value.dtype == _FLOAT for value in values)


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    return [
        value
        for index, value in enumerate(node.inputs)
        if value is not None and (node.op_type, index) not in _ALWAYS_FLOAT
    ]


class _HalfRewrite:
    """A pass through a graph in order that inserts one Cast at each border between half and float32."""

    def __init__(
        self,
        model: ir.Model,
        weights: set[str],
        float32_inputs: frozenset[str],
        float32_nodes: set[str],
        ranges: Mapping[str, float],
    ) -> None:
        self.graph = model.graph
        self.weights = weights
        self.float32_nodes = float32_nodes
        self.ranges = ranges
        # Values that count as half: weights, and inputs, which stay float32 in the signature and are cast at each use.
        self.half = {
            str(value.name) for value in self.graph.inputs if _is_float(value) and value.name not in float32_inputs
        } | weights
        self.casts: dict[tuple[str, ir.DataType], ir.Value] = {}

    def visit(self, node: ir.Node) -> None:
        reached = any(self._is_half(value) for value in _data_inputs(node))
        in_half = reached and node.name not in self.float32_nodes
        dtype = _HALF if in_half else _FLOAT
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value) and (node.op_type, index) not in _ALWAYS_FLOAT:
                node.replace_input_with(index, self._convert(value, dtype, node))
        for value in node.outputs:
            if _is_float(value) and node.op_type != "Cast":
                self._set_output(value, reached=reached, in_half=in_half)

    def restore_outputs(self) -> None:
        for index, output in enumerate(self.graph.outputs):
            if output.dtype == _HALF:
                name, shape = output.name, output.shape
                output.name = f"{name}/half"
                cast = _cast(output, _FLOAT, f"{name}/Cast")
                cast.outputs[0].name, cast.outputs[0].shape = name, shape
                self.graph.append(cast)
                self.graph.outputs[index] = cast.outputs[0]

    def _is_half(self, value: ir.Value | None) -> bool:
        return value is not None and str(value.name) in self.half

    def _set_output(self, value: ir.Value, *, reached: bool, in_half: bool) -> None:
        if in_half:
            value.dtype = _HALF
            self.half.add(str(value.name))
        elif reached and _fits_half(self.ranges.get(str(value.name), 0.0)):
            # Its range fits half again, so its users compute in half; the Cast is before the first of them.
            self.half.add(str(value.name))

    def _convert(self, value: ir.Value, dtype: ir.DataType, user: ir.Node) -> ir.Value:
        if value.dtype == dtype:
            return value
        key = (str(value.name), dtype)
        if key not in self.casts:
            self.casts[key] = self._convert_constant(value, dtype) or self._cast_before(value, dtype, user)
        return self.casts[key]

    def _convert_constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value | None:
        if value.const_value is None or value.name in self.weights or dtype != _HALF:
            return None
        with np.errstate(over="ignore"):
            array = value.const_value.numpy().astype(np.float16)
        tensor = ir.tensor(array, name=f"{value.name}/half")
        constant = ir.Value(name=tensor.name, type=ir.TensorType(_HALF), shape=value.shape, const_value=tensor)
        self.graph.initializers[str(constant.name)] = constant
        return constant

    def _cast_before(self, value: ir.Value, dtype: ir.DataType, user: ir.Node) -> ir.Value:
        cast = _cast(value, dtype, f"{value.name}/{dtype.name.lower()}")
        self.graph.insert_before(user, cast)
        return cast.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, ir.TensorType(dtype), value.shape
    return cast


def _is_our_own(name: str) -> bool:
    """Return whether a node belongs to no module of the checkpoint (`passes.name_nodes`)."""
    return name.startswith("/") or name.rpartition("/")[0].endswith(f".{MATCHING}")


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (_FLOAT, _HALF)

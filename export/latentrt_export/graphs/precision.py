"""Which operations stay in float32, and how a float32 graph becomes one that computes in half.

A graph is traced once, in float32. From it come both graphs of a half bundle: one that computes in half, and one that
computes in float32 from the same half weights, for backends (a CPU) where half is slower. Nothing is ever computed in
half to make them.

The half graph follows torch's own promotion: half weights and half inputs pull what they meet into half; what depends
on neither stays float32 until it does (the sines of a timestep, whose input diffusers keeps in float32; the
preprocessing of the safety classifier, whose input is uint8). What our own modules compute around the checkpoint's
(finished pixels, the cosines of the safety classifier, which tokens are merged) stays float32. Beyond that, a node
whose inputs or outputs come near half's range on real inputs stays float32, one node at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir

from latentrt_export.token_merging_ratio import MATCHING

__all__ = ["RANGE_LIMIT", "compute_in_float32", "compute_in_half", "nodes_in_float32"]

# A quarter of half's largest number: prompts and pictures that were not measured get two bits of headroom.
RANGE_LIMIT = float(np.finfo(np.float16).max) / 4

_HALF, _FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT
# Inputs that the operator's definition fixes to float32 whatever the data's type: (operator, position).
_ALWAYS_FLOAT = {("Resize", 1), ("Resize", 2)}
# Operators that compute nothing: a change of type is the border itself, a shape is read from a value of any type.
_MOVES = {"Cast", "Shape", "Constant"}


def nodes_in_float32(model: ir.Model, ranges: Mapping[str, float]) -> tuple[str, ...]:
    """The nodes that must stay float32: our own arithmetic, and those that take or give a value beyond `RANGE_LIMIT`.

    Args:
        model: the float32 graph, its nodes named by `passes.names`.
        ranges: largest absolute value seen of each float32 value, by name (`ranges.measure_ranges`).
    """
    return tuple(
        str(node.name)
        for node in model.graph
        if _is_our_own(str(node.name))
        or any(
            value is not None and ranges.get(str(value.name), 0.0) > RANGE_LIMIT
            for value in (*node.inputs, *node.outputs)
        )
    )


def compute_in_float32(model: ir.Model, weights: Iterable[str]) -> None:
    """Make a float32 graph read half weights: each passes through one Cast, which a backend folds at load."""
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
    """Rewrite a float32 graph, in place, to compute in half.

    Args:
        model: the float32 graph; its inputs and outputs stay float32.
        weights: names of the weights, which are half from now on.
        float32_inputs: inputs whose arithmetic stays float32 until it meets half.
        float32_nodes: names of nodes that stay float32 (`nodes_in_float32`).
        ranges: as in `nodes_in_float32`; a value beyond the limit is never stored in half.

    Returns:
        The names of the nodes that compute in float32: those that were named, and those that half does not reach.
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
    """One walk through the graph in order, casting at each border between half and float32 once."""

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
        # Inputs that enter as half although the signature says float32: they are cast where they are used.
        self.half = {
            str(value.name) for value in self.graph.inputs if _is_float(value) and value.name not in float32_inputs
        } | weights
        self.casts: dict[tuple[str, ir.DataType], ir.Value] = {}

    def visit(self, node: ir.Node) -> None:
        kept = node.name in self.float32_nodes
        reached = any(self._pulls_into_half(value) for value in _data_inputs(node))
        in_half = reached and not kept
        wanted = _HALF if in_half else _FLOAT
        for index, value in enumerate(node.inputs):
            if value is not None and _is_float(value) and (node.op_type, index) not in _ALWAYS_FLOAT:
                node.replace_input_with(index, self._as(value, wanted, node))
        for value in node.outputs:
            if _is_float(value) and node.op_type != "Cast":
                self._settle(value, reached=reached, in_half=in_half)

    def restore_outputs(self) -> None:
        for index, output in enumerate(self.graph.outputs):
            if output.dtype == _HALF:
                name, shape = output.name, output.shape
                output.name = f"{name}/half"
                cast = _cast(output, _FLOAT, f"{name}/Cast")
                cast.outputs[0].name, cast.outputs[0].shape = name, shape
                self.graph.append(cast)
                self.graph.outputs[index] = cast.outputs[0]

    def _pulls_into_half(self, value: ir.Value | None) -> bool:
        return value is not None and str(value.name) in self.half

    def _settle(self, value: ir.Value, *, reached: bool, in_half: bool) -> None:
        if in_half:
            value.dtype = _HALF
            self.half.add(str(value.name))
        elif reached and self.ranges.get(str(value.name), 0.0) <= RANGE_LIMIT:
            # Small enough for half again: users of it go on in half, through a cast made where it is first used.
            self.half.add(str(value.name))

    def _as(self, value: ir.Value, wanted: ir.DataType, user: ir.Node) -> ir.Value:
        if value.dtype == wanted:
            return value
        key = (str(value.name), wanted)
        if key not in self.casts:
            self.casts[key] = self._constant(value, wanted) or self._cast_before(value, wanted, user)
        return self.casts[key]

    def _constant(self, value: ir.Value, wanted: ir.DataType) -> ir.Value | None:
        if value.const_value is None or value.name in self.weights or wanted != _HALF:
            return None
        with np.errstate(over="ignore"):
            array = value.const_value.numpy().astype(np.float16)
        tensor = ir.tensor(array, name=f"{value.name}/half")
        constant = ir.Value(name=tensor.name, type=ir.TensorType(_HALF), shape=value.shape, const_value=tensor)
        self.graph.initializers[str(constant.name)] = constant
        return constant

    def _cast_before(self, value: ir.Value, wanted: ir.DataType, user: ir.Node) -> ir.Value:
        cast = _cast(value, wanted, f"{value.name}/{wanted.name.lower()}")
        self.graph.insert_before(user, cast)
        return cast.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, ir.TensorType(dtype), value.shape
    return cast


def _is_our_own(name: str) -> bool:
    """Whether a node stands in no module of the checkpoint's (`passes.names`)."""
    return name.startswith("/") or name.rpartition("/")[0].endswith(f".{MATCHING}")


def _is_float(value: ir.Value) -> bool:
    return value.dtype in (_FLOAT, _HALF)

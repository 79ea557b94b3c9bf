"""Replaces the transposition of attention keys through three dimensions and computed shapes by one Transpose."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["TransposeKeys"]


class TransposeKeys(ir.passes.InPlacePass):
    """Rewrite Reshape(−1, L, E) → Transpose(0, 2, 1) → Reshape(…, E, L) of attention keys to Transpose(0, 1, 3, 2).

    The keys are [B, H, L, E] and become [B, H, E, L]; L and E are read from the keys' own shape. Other reshapes around
    a transpose have another meaning and are not changed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        ends = [(node, keys) for node in model.graph if (keys := _find_keys(node)) is not None]
        for end, keys in ends:
            transpose = ir.node("Transpose", [keys], {"perm": [0, 1, 3, 2]})
            transpose.metadata_props.update(end.metadata_props)
            transpose.outputs[0].type = end.outputs[0].type
            model.graph.insert_before(end, transpose)
            ir.convenience.replace_all_uses_with(end.outputs[0], transpose.outputs[0])
        return ir.passes.PassResult(model, modified=bool(ends))


def _find_keys(end: ir.Node) -> ir.Value | None:
    """Return the four-dimensional keys if `end` is the last node of the pattern."""
    swap = _producer(end, 0, "Transpose")
    flatten = _producer(swap, 0, "Reshape")
    if end.op_type != "Reshape" or end.outputs[0].is_graph_output() or swap is None or flatten is None:
        return None
    keys = flatten.inputs[0]
    if keys is None or keys.shape is None or len(keys.shape) != 4:
        return None
    matches = (
        list(swap.attributes["perm"].as_ints()) == [0, 2, 1]
        and _sizes(flatten, keys) == [None, -2, -1]
        and _sizes(end, keys)[1:] == [-1, -2]
    )
    return keys if matches else None


def _sizes(reshape: ir.Node, keys: ir.Value) -> list[int | None]:
    """Return the index in the keys' shape from which each part of a Reshape's target is read; None for other parts."""
    target = _producer(reshape, 1, "Concat")
    return [_start(_producer_of(part, "Slice"), keys) for part in target.inputs] if target is not None else []


def _start(part: ir.Node | None, keys: ir.Value) -> int | None:
    shape = _producer(part, 0, "Shape")
    if part is None or shape is None or shape.inputs[0] is not keys:
        return None
    start = ir.convenience.get_const_tensor(part.inputs[1]) if part.inputs[1] is not None else None
    return None if start is None else int(start.numpy().item())


def _producer(node: ir.Node | None, index: int, operator: str) -> ir.Node | None:
    return _producer_of(node.inputs[index], operator) if node is not None and index < len(node.inputs) else None


def _producer_of(value: ir.Value | None, operator: str) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == operator else None

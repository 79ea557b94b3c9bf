"""Attention transposes its keys by way of three dimensions and a shape computed at run time; one Transpose says the same."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["TransposeKeysDirectly"]


class TransposeKeysDirectly(ir.passes.InPlacePass):
    """Rewrite Reshape → Transpose(0, 2, 1) → Reshape around the keys of an attention, (B, H, L, E) → (B, H, E, L), to Transpose(0, 1, 3, 2)."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        ends = [node for node in model.graph if _keys(node) is not None]
        for end in ends:
            keys = _keys(end)
            transpose = ir.node("Transpose", [keys], {"perm": [0, 1, 3, 2]})
            transpose.metadata_props.update(end.metadata_props)
            transpose.outputs[0].type = end.outputs[0].type
            model.graph.insert_before(end, transpose)
            ir.convenience.replace_all_uses_with(end.outputs[0], transpose.outputs[0])
        return ir.passes.PassResult(model, modified=bool(ends))


def _keys(end: ir.Node) -> ir.Value | None:
    """The four-dimensional keys if `end` is the last node of the detour and feeds a matrix product."""
    if end.op_type != "Reshape" or any(user.op_type not in ("MatMul", "Mul") for user in end.outputs[0].consumers()):
        return None
    swap = end.inputs[0].producer() if end.inputs[0] is not None else None
    if swap is None or swap.op_type != "Transpose" or list(swap.attributes["perm"].as_ints()) != [0, 2, 1]:
        return None
    flatten = swap.inputs[0].producer() if swap.inputs[0] is not None else None
    if flatten is None or flatten.op_type != "Reshape":
        return None
    keys = flatten.inputs[0]
    return keys if keys is not None and keys.shape is not None and len(keys.shape) == 4 else None

"""Fuses self-attention to ONNX Runtime's MultiHeadAttention, which stores no scores; for graphs that run on a CPU.

In primitive operators, the score of every query with every key is in memory at once: 1 GiB for two samples of 64 × 64
latents and eight heads. The fused operator processes the keys in blocks. OpenVINO fuses either form by itself, so it
reads this one too; TensorRT does not have the operator.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

__all__ = ["DOMAIN", "FuseSelfAttention"]

DOMAIN = "com.microsoft"


class FuseSelfAttention(ir.passes.InPlacePass):
    """Rewrite softmax((s·Q)(s·K)ᵀ) V between its reshapes to one MultiHeadAttention(Q, K, V) of [B, N, H·E] each.

    Only attention whose queries, keys and values are projections of one value is fused: the keys of cross-attention
    are computed outside of the loop (`graphs.split`) in their usual layout. Other patterns are not changed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        found = [(end, fused) for node in model.graph if (fused := _fuse(node)) for end in [_find_end(node)] if end]
        for end, attention in found:
            model.graph.insert_before(end, attention)
            ir.convenience.replace_all_uses_with(end.outputs[0], attention.outputs[0])
        if found:
            model.opset_imports[DOMAIN] = 1
            RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=bool(found))


def _fuse(softmax: ir.Node) -> ir.Node | None:
    """Return the operator that replaces the attention around a Softmax over keys; None for other nodes."""
    end, scores, means = _find_end(softmax), _producer(softmax, 0, "MatMul"), _only_reader(softmax, "MatMul")
    if softmax.op_type != "Softmax" or end is None or scores is None or means is None:
        return None
    scaled = [_producer(scores, index, "Mul") for index in (0, 1)]
    heads = _producer(scaled[0], 0, "Transpose")
    sources = [_merge_heads(scaled[0]), _merge_heads(_producer(scaled[1], 0, "Transpose")), _merge_heads(means, 1)]
    inputs = {_find_projection_input(source) for source in sources}
    factors = [_constant(node, 1) for node in scaled]
    shape = heads.outputs[0].shape if heads is not None else None
    if len(inputs) != 1 or None in inputs or None in factors or shape is None or not isinstance(shape[1], int):
        return None
    scale = float(factors[0]) * float(factors[1])  # type: ignore[arg-type]
    name = f"{str(softmax.name).rpartition('/')[0]}/MultiHeadAttention"
    node = ir.node("MultiHeadAttention", sources, {"num_heads": shape[1], "scale": scale}, domain=DOMAIN, name=name)
    node.outputs[0].name = name
    node.outputs[0].type, node.outputs[0].shape = end.outputs[0].type, end.outputs[0].shape
    return node


def _find_end(softmax: ir.Node) -> ir.Node | None:
    """Return the Reshape behind attention that concatenates the heads."""
    transpose = _only_reader(_only_reader(softmax, "MatMul"), "Transpose")
    end = _only_reader(transpose, "Reshape")
    return end if transpose is not None and _swaps_heads(transpose) else None


def _merge_heads(node: ir.Node | None, index: int = 0) -> ir.Value | None:
    """Return the value [B, N, H·E] of which an input of a node is the view [B, H, N, E]."""
    transpose = _producer(node, index, "Transpose")
    reshape = _producer(transpose, 0, "Reshape")
    return reshape.inputs[0] if transpose is not None and reshape is not None and _swaps_heads(transpose) else None


def _find_projection_input(product: ir.Value | None) -> ir.Value | None:
    """Return the first factor of a matrix product; None for any other value."""
    node = product.producer() if product is not None else None
    return node.inputs[0] if node is not None and node.op_type == "MatMul" else None


def _swaps_heads(transpose: ir.Node) -> bool:
    return list(transpose.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _producer(node: ir.Node | None, index: int, op_type: str) -> ir.Node | None:
    value = node.inputs[index] if node is not None and index < len(node.inputs) else None
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == op_type else None


def _only_reader(node: ir.Node | None, op_type: str) -> ir.Node | None:
    uses = tuple(node.outputs[0].uses()) if node is not None else ()
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == op_type else None


def _constant(node: ir.Node | None, index: int) -> float | None:
    value = node.inputs[index] if node is not None else None
    array = value.const_value.numpy() if value is not None and value.const_value is not None else None
    return float(array.item()) if array is not None and array.size == 1 else None

"""Drops torch's guard of softmax against rows that are masked entirely; none of our masks has such a row."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["DropSafeSoftmax"]


class DropSafeSoftmax(ir.passes.InPlacePass):
    """Rewrite Where(IsNaN(p), 0, p), with p a Softmax, to p.

    The guard matters only for a row of −inf, and a causal mask keeps at least the diagonal of every row.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        guards = [node for node in model.graph if _is_guard(node)]
        for guard in guards:
            probabilities = guard.inputs[2]
            assert probabilities is not None
            ir.convenience.replace_all_uses_with(guard.outputs[0], probabilities)
        return ir.passes.PassResult(model, modified=bool(guards))


def _is_guard(node: ir.Node) -> bool:
    if node.op_type != "Where" or node.outputs[0].is_graph_output():
        return False
    condition, replacement, kept = node.inputs
    if condition is None or kept is None or not _is_zero(replacement):
        return False
    test, source = condition.producer(), kept.producer()
    return (
        test is not None
        and source is not None
        and test.op_type == "IsNaN"
        and test.inputs[0] is kept
        and source.op_type == "Softmax"
    )


def _is_zero(value: ir.Value | None) -> bool:
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return constant is not None and not constant.numpy().any()

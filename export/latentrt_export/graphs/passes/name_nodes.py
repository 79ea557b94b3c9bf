"""Names nodes after the modules they were traced in, and removes the tracer's file names and line numbers."""

from __future__ import annotations

import ast
import re
from collections import Counter

import onnx_ir as ir

__all__ = ["NameNodes"]

# torch's path of a module that was accessed without its parent's `__getattr__`.
_THROUGH_DICT = re.compile(r"__dict__\['_modules'\]\['(\w+)'\]")
# torch's path of a node that its own passes added.
_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"


class NameNodes(ir.passes.InPlacePass):
    """Name each node `module.path/Op`, numbered where one module has several, and remove the tracer's metadata.

    A parse error, a profile or a precision report then names
    `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q/MatMul`. The nodes that an exported module adds around
    the checkpoint's have an empty path: `/Clip`.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        seen: Counter[str] = Counter()
        scope = ""
        for node in model.graph:
            scope = _scope(node, otherwise=scope)
            name = f"{scope}/{node.op_type}"
            node.name = f"{name}_{seen[name]}" if seen[name] else name
            seen[name] += 1
            node.metadata_props.clear()
            node.doc_string = None
            if len(node.outputs) == 1 and not node.outputs[0].is_graph_output():
                node.outputs[0].name = node.name
        model.metadata_props.clear()
        model.graph.metadata_props.clear()
        model.graph.doc_string = model.doc_string = None
        model.producer_name, model.producer_version = "latentrt", None
        return ir.passes.PassResult(model, modified=True)


def _scope(node: ir.Node, *, otherwise: str) -> str:
    """Return the path of a node's module; for a node that a pass added, `otherwise`, the path of the node before it."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if not scopes:
        return otherwise
    modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]
    if modules and modules[-1] == _NO_MODULE:
        return otherwise
    return _THROUGH_DICT.sub(r"\1", modules[-1]).removeprefix("model.") if modules else ""

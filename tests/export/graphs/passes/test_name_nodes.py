"""Nodes are named after their module, and the tracer's metadata is removed."""

from __future__ import annotations

import onnx_ir as ir

from latentrt_export.graphs.passes.name_nodes import NameNodes
from tests.export.small_graph import small_graph


def build_chain(*scopes: str | None) -> ir.Model:
    """Build a chain of Relu, each from the module of this path; None for a node that a pass added."""
    values = " ".join(f"v{index + 1} = Relu(v{index})" for index in range(len(scopes)))
    model = small_graph(f"g (float[B] v0) => (float[B] v{len(scopes)}) {{ {values} }}")
    for node, scope in zip(model.graph, scopes, strict=True):
        node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/someone/site-packages/x.py", line 1'
        node.doc_string = "/home/someone"
        if scope is not None:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = str(["", scope, "relu_1"])
    return model


def test_nodes_are_named_after_their_module() -> None:
    model = build_chain("model.down.0", "model.down.0", None, "model.up", "", "model.down.0")
    NameNodes()(model)
    names = [node.name for node in model.graph]
    assert names == ["down.0/Relu", "down.0/Relu_1", "down.0/Relu_2", "up/Relu", "/Relu", "down.0/Relu_3"]
    assert [node.outputs[0].name for node in model.graph] == [*names[:-1], "v6"], "an output keeps its name"


def test_a_module_reached_through_its_parents_dict_has_its_plain_name() -> None:
    model = build_chain("model.__dict__['_modules']['time_proj']", "__dict__['_modules']['time_proj'].act")
    NameNodes()(model)
    assert [node.name for node in model.graph] == ["time_proj/Relu", "time_proj.act/Relu"]


def test_torchs_path_for_no_module_is_ignored() -> None:
    model = build_chain("model.up", "_empty_nn_module_stack_from_metadata_hook")
    NameNodes()(model)
    assert [node.name for node in model.graph] == ["up/Relu", "up/Relu_1"]


def test_metadata_of_the_machine_is_removed() -> None:
    model = build_chain("model.up", None)
    model.metadata_props["source"] = model.graph.metadata_props["source"] = "/home/someone"
    NameNodes()(model)
    assert b"/home" not in ir.to_proto(model).SerializeToString()

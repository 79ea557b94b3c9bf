"""Parts as they are listed."""

from __future__ import annotations

from latentrt.bundle.describe import group_parts
from latentrt.bundle.manifest import GateResult, GraphRecord, Part, PartName
from latentrt.bundle.tensors import TensorSpec

RESULT = GateResult(output="pixels", shapes={}, metric="levels", value=1, bound=1)


def part(name: PartName, *gate: GateResult) -> Part:
    spec = TensorSpec(name, "float32", ("batch",))
    graph = GraphRecord(file=f"{name}.onnx", opset=21, nodes=3, float32_nodes=("a", "b"), gate=gate)
    return Part(inputs=(spec,), outputs=(spec,), graphs={"float32": graph})


def test_slices_are_one_line_in_the_order_of_a_run() -> None:
    # As a manifest has them, by name.
    names = [
        "attention",
        "head",
        "neck",
        "slice.0",
        "slice.1",
        "slice.10",
        *(f"slice.{number}" for number in range(2, 10)),
    ]
    (line,) = group_parts({name: part(name, *[RESULT] * (name == "slice.10")) for name in names})
    assert line.title == "14 slices"
    assert (line.inputs[0].name, line.outputs[0].name) == ("head", "slice.10")
    assert line.precisions == ("float32",)
    assert (line.nodes("float32"), line.float32_nodes("float32")) == (42, 28)
    assert line.gate("float32") == (RESULT,)


def test_other_parts_have_a_line_each() -> None:
    lines = [*group_parts({name: part(name) for name in ("body", "cross_attention_kv", "time_embedding")})]
    assert [line.title for line in lines] == ["body", "cross_attention_kv", "time_embedding"]
    assert [line.inputs[0].name for line in lines] == ["body", "cross_attention_kv", "time_embedding"]
    assert [*group_parts({})] == []

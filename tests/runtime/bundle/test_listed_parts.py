"""Parts as they are listed."""

from __future__ import annotations

from latentrt.bundle.listed_parts import listed_parts
from latentrt.bundle.manifest import GateFigure, GraphRecord, Part, PartName
from latentrt.bundle.tensors import TensorSpec

FIGURE = GateFigure(output="pixels", shapes={}, measure="levels", figure=1, bound=1)


def part(name: PartName, *gate: GateFigure) -> Part:
    spec = TensorSpec(name, "float32", ("batch",))
    graph = GraphRecord(file=f"{name}.onnx", opset=21, nodes=3, float32_nodes=("a", "b"), gate=gate)
    return Part(inputs=(spec,), outputs=(spec,), graphs={"float32": graph})


def test_slices_are_one_line_in_the_order_of_a_run() -> None:
    # As a manifest has them, by name.
    names = [
        "attention",
        "head",
        "neck",
        "stage.0",
        "stage.1",
        "stage.10",
        *(f"stage.{number}" for number in range(2, 10)),
    ]
    (line,) = listed_parts({name: part(name, *[FIGURE] * (name == "stage.10")) for name in names})
    assert line.title == "14 slices"
    assert (line.inputs[0].name, line.outputs[0].name) == ("head", "stage.10")
    assert line.precisions == ("float32",)
    assert (line.nodes("float32"), line.float32_nodes("float32")) == (42, 28)
    assert line.gate("float32") == (FIGURE,)


def test_other_parts_have_a_line_each() -> None:
    lines = [*listed_parts({name: part(name) for name in ("loop", "prompt", "timestep")})]
    assert [line.title for line in lines] == ["loop", "prompt", "timestep"]
    assert [line.inputs[0].name for line in lines] == ["loop", "prompt", "timestep"]
    assert [*listed_parts({})] == []

"""The parts of a decoder in a bundle: their files and records, and the gate that a defect does not pass."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Component, GraphRecord, PartName
from latentrt.errors import GateError
from latentrt_export.graphs import slices, slices_maker
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.parts import Run
from latentrt_export.graphs.slices_maker import SlicesMaker
from latentrt_export.graphs.trace import OPSET
from tests.export.graphs.sliced import LATENTS
from tests.exported import Exported

Models = dict[PartName, ir.Model]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    exported: Exported = request.getfixturevalue(request.param)
    return Bundle.open(exported.bundle)


@pytest.fixture
def decoder(bundle: Bundle) -> Component:
    return bundle.manifest.components["vae_decoder"]


def test_the_decoders_float32_graph_has_slices(bundle: Bundle, decoder: Component) -> None:
    assert {"head", "attention", "neck", "slice.0", "slice.10"} <= decoder.parts.keys()
    whole = decoder.graphs["float32"].file
    for name, part in decoder.parts.items():
        assert set(part.graphs) == {"float32"}, "half graphs are for GPUs, which decode whole"
        record = part.graphs["float32"]
        assert record.file == whole.replace("model", name)
        model = onnx.load(bundle.path(record.file), load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
        assert record.nodes == len(model.graph.node)
        assert [spec.name for spec in part.inputs] == [value.name for value in model.graph.input]
        assert [spec.name for spec in part.outputs] == [value.name for value in model.graph.output]


def test_the_last_ones_figure_is_of_all_of_them(decoder: Component) -> None:
    gates = {name: part.graphs["float32"].gate for name, part in decoder.parts.items()}
    (last,) = (name for name, gate in gates.items() if gate)
    assert [spec.name for spec in decoder.parts[last].outputs] == ["pixels"]
    assert [figure.shapes for figure in gates[last]] == [
        {"latents": (1, 4, 16, 16)},
        {"latents": (3, 4, 17, 15)},
        {"latents": (1, 4, 41, 32)},
    ]
    assert all((figure.metric, figure.bound) == ("levels", 1) for figure in gates[last])
    assert all(figure.value <= 1 for figure in gates[last])


def make(folder: Path, place: Path) -> SlicesMaker:
    """Cut the graph of a float32 bundle's decoder, at a place of its own, and judge it."""
    shutil.copy(folder / "model.safetensors", place)
    model = ir.load(folder / "model.onnx")
    feeds = {"latents": np.random.default_rng(0).standard_normal((1, 4, 9, 8), np.float32)}
    runs = [Run(feeds, Graph(folder / "model.onnx").run(feeds))]
    phases: list[str] = []
    maker = SlicesMaker(inputs=LATENTS, folder=place, prefix="vae_decoder/", phase=phases.append)
    record = GraphRecord(file="vae_decoder/model.onnx", opset=OPSET, nodes=len(model.graph))
    maker.make(model, record, "float16", runs)
    assert not maker.parts
    assert not phases
    maker.make(model, record, "float32", runs)
    assert phases == ["checking the slices of the float32 graph"]
    return maker


def other_weight(parts: Models) -> None:
    """One stage with another's bias."""
    one, two = (
        parts[stage].graph.initializers[f"decoder.up_blocks.{block}.resnets.1.conv1.bias"]
        for stage, block in (("slice.3", 2), ("slice.8", 3))
    )
    one.const_value = two.const_value


def other_epsilon(parts: Models) -> None:
    (epsilon,) = (value for name, value in parts["slice.1"].graph.initializers.items() if name.endswith("/epsilon"))
    epsilon.const_value = ir.tensor(np.float32(0.1), name=epsilon.name)


def no_edge(parts: Models) -> None:
    """What is outside of the picture goes through the activation as if it were inside."""
    (inside,) = (value for value in parts["slice.1"].graph.inputs if value.name == "inside")
    (mask,) = inside.consumers()
    ir.convenience.replace_all_uses_with(mask.outputs[0], mask.inputs[0])  # type: ignore[arg-type]
    parts["slice.1"].graph.remove(mask)
    parts["slice.1"].graph.inputs.remove(inside)


def wrong_half_of_the_halo(parts: Models) -> None:
    """After a nearest neighbour, two rows too many above and none below."""
    constants = parts["slice.0"].graph.initializers
    for name, value in constants.items():
        for ending, index in (("/first", 2), ("/end", 1 << 40)):
            if name.endswith(ending):
                value.const_value = ir.tensor(np.array([index]), name=name)


def not_finite(parts: Models) -> None:
    bias = parts["head"].graph.initializers["decoder.conv_in.bias"]
    bias.const_value = ir.tensor(np.full(bias.const_value.shape.numpy(), np.nan, np.float32), name=bias.name)  # type: ignore[union-attr]


@pytest.mark.parametrize("spoil", [other_weight, other_epsilon, no_edge, wrong_half_of_the_halo, not_finite])
def test_a_defect_in_a_slice_is_caught(
    sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Models], None]
) -> None:
    def spoilt(model: ir.Model) -> Models:
        parts = slices.slice_decoder(model)
        spoil(parts)
        return parts

    folder = sd1.bundle / "vae_decoder"
    monkeypatch.setattr(slices_maker, "slice_decoder", spoilt)
    with pytest.raises(
        GateError, match=r"the float32 graph and its slices: pixels is .* \(levels\) from its own"
    ) as miss:
        make(folder, tmp_path)
    assert "for inputs of shape {'latents': (1, 4, 9, 8)}" in str(miss.value)
    assert "--no-parts leaves the slices out" in str(miss.value)


def test_without_a_defect_it_passes(sd1: Exported, tmp_path: Path) -> None:
    maker = make(sd1.bundle / "vae_decoder", tmp_path)
    (figure,) = maker.parts["slice.10"].graphs["float32"].gate
    assert figure.value <= 1

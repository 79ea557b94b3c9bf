"""The parts of a bundle: their files and records, and the gate that a defect in one of them does not pass."""

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
from latentrt.errors import ExportError, GateError, RequestError
from latentrt_export.graphs import division
from latentrt_export.graphs import parts as module
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.parts import PartsMaker, Run
from latentrt_export.graphs.passes.one_attention import DOMAIN
from latentrt_export.graphs.trace import OPSET
from latentrt_export.modules.unet import UNet
from tests.export.graphs.divided import Case, feeds_of
from tests.exported import Exported

Models = dict[PartName, ir.Model]


# What a bundle says of its parts


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    exported: Exported = request.getfixturevalue(request.param)
    return Bundle.open(exported.bundle)


@pytest.fixture(scope="module")
def unet(bundle: Bundle) -> Component:
    return bundle.manifest.components["unet"]


def test_the_denoisers_float32_graph_has_parts(bundle: Bundle, unet: Component) -> None:
    assert set(unet.parts) == {"time_embedding", "cross_attention_kv", "body", "shallow_body"}
    for name, part in unet.parts.items():
        assert set(part.graphs) == {"float32"}, "half graphs are for GPUs, which run them whole"
        for precision, graph in part.graphs.items():
            assert graph.file == unet.graphs[precision].file.replace("model", name)
            assert bundle.component_files("unet", precision, name) == (graph.file, "unet/model.safetensors")
    others = {name for name, component in bundle.manifest.components.items() if component.parts} - {"unet"}
    assert others == {"vae_decoder"}, "whose slices are test_slices_maker's"


def test_records_are_true_of_the_files(bundle: Bundle, unet: Component) -> None:
    for part in unet.parts.values():
        for record in part.graphs.values():
            path = bundle.path(record.file)
            onnx.checker.check_model(str(path), full_check=True)
            model = onnx.load(path, load_external_data=False)
            opsets = {opset.domain: opset.version for opset in model.opset_import}
            assert opsets == {"": OPSET, DOMAIN: 1}
            assert (record.opset, record.nodes) == (OPSET, len(model.graph.node))
            assert len({node.name for node in model.graph.node}) == record.nodes
            for values, specs in ((model.graph.input, part.inputs), (model.graph.output, part.outputs)):
                assert [_described(value) for value in values] == [(spec.name, spec.shape) for spec in specs]


def _described(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    assert tensor.elem_type == onnx.TensorProto.FLOAT
    return value.name, tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)


def test_weights_stay_in_the_components_file(bundle: Bundle, unet: Component) -> None:
    for part in unet.parts.values():
        for record in part.graphs.values():
            model = onnx.load(bundle.path(record.file), load_external_data=False)
            outside = [tensor for tensor in model.graph.initializer if tensor.data_location]
            assert {entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"} == {
                "model.safetensors"
            }
            assert all(tensor.name.endswith((".weight", ".bias")) for tensor in outside)
            assert bundle.path(record.file).stat().st_size < 1024 * record.nodes


def test_figures_are_of_all_sizes_and_within_their_bounds(unet: Component) -> None:
    for name, part in unet.parts.items():
        for precision, record in part.graphs.items():
            shapes = [figure.shapes for figure in record.gate]
            assert shapes == [figure.shapes for figure in unet.graphs[precision].gate]
            for figure in record.gate:
                assert (figure.output, figure.metric) == ("noise_pred", "relative")
                assert 0 <= figure.value <= figure.bound == module._BOUND
            if name == "shallow_body":
                # Not a bit: the loop's own nodes on the loop's own values.
                assert {figure.value for figure in record.gate} == {0.0}


# The gate


def make(model: ir.Model, weights: Path, folder: Path, *, deep_cache: int | None = None) -> PartsMaker:
    shutil.copy(weights, folder / "model.safetensors")
    file = "model.float32.onnx"
    ir.save(model, folder / file)
    feeds = feeds_of(model, Case(batch=2, height=5, width=6))
    runs = [Run(feeds, Graph(folder / file).run(feeds))]
    phases: list[str] = []
    maker = PartsMaker(
        alone=UNet.loop_invariant_inputs, deep_cache=deep_cache, folder=folder, prefix="unet/", phase=phases.append
    )
    record = GraphRecord(file=f"unet/{file}", opset=OPSET, nodes=len(model.graph))
    maker.make(model, record, "float16", runs)
    assert not maker.parts
    assert not phases
    maker.make(model, record, "float32", runs)
    assert phases == ["checking the parts of the float32 graph"]
    return maker


def test_a_graph_is_divided_beside_itself(sd1: Exported, tmp_path: Path) -> None:
    folder = sd1.bundle / "unet"
    maker = make(ir.load(folder / "model.onnx"), folder / "model.safetensors", tmp_path, deep_cache=3)
    assert set(maker.parts) == {"time_embedding", "cross_attention_kv", "body", "shallow_body"}
    for name, part in maker.parts.items():
        record = part.graphs["float32"]
        assert record.file == f"unet/{name}.float32.onnx"
        assert (tmp_path / f"{name}.float32.onnx").exists()
    assert [spec.name for spec in maker.parts["body"].outputs] == ["noise_pred", "deep_features"]


def other_weight(parts: Models) -> None:
    """One matrix of keys in place of another of the same shape."""
    weights = parts["cross_attention_kv"].graph.initializers
    one, two = (
        weights[f"up_blocks.{block}.attn2.to_k.weight"]
        for block in ("1.attentions.0.transformer_blocks.0", "1.attentions.1.transformer_blocks.0")
    )
    one.const_value, two.const_value = two.const_value, one.const_value


def swapped_names(parts: Models) -> None:
    """Two values under each other's name."""
    one, two = (value for value in parts["time_embedding"].graph.outputs if str(value.name).startswith("mid_block"))
    one.name, two.name = two.name, one.name


def not_finite(parts: Models) -> None:
    bias = parts["time_embedding"].graph.initializers["time_embedding.linear_2.bias"]
    bias.const_value = ir.tensor(np.full(bias.const_value.shape.numpy(), np.nan, np.float32), name=bias.name)  # type: ignore[union-attr]


def other_features(parts: Models) -> None:
    """The part for an earlier step's features takes the skip in their place."""
    graph = parts["shallow_body"].graph
    features = next(value for value in graph.inputs if value.name == "deep_features")
    (join,) = features.consumers()
    ir.convenience.replace_all_uses_with(features, join.inputs[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_weight, r"the float32 graph and its parts together: noise_pred is .* \(relative\) from its own"),
        (swapped_names, "the float32 graph and its parts together: noise_pred is"),
        (not_finite, "noise_pred has values that are not finite"),
        (other_features, "the float32 graph and its shallow part: noise_pred is"),
    ],
)
def test_a_defect_in_a_part_is_caught(
    sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Models], None], words: str
) -> None:
    def spoilt(*arguments: object) -> Models:
        parts = division.divide(*arguments)  # type: ignore[arg-type]
        spoil(parts)
        return parts

    monkeypatch.setattr(module, "divide", spoilt)
    folder = sd1.bundle / "unet"
    with pytest.raises(GateError, match=words) as miss:
        make(ir.load(folder / "model.onnx"), folder / "model.safetensors", tmp_path, deep_cache=0)
    assert "for inputs of shape {'sample': (2, 4, 5, 6)" in str(miss.value)
    assert "--no-parts leaves the parts out" in str(miss.value)


def test_a_denoiser_that_cannot_be_divided_says_what_leaves_the_parts_out(sd1: Exported, tmp_path: Path) -> None:
    folder = sd1.bundle / "unet"
    model = ir.load(folder / "model.onnx")
    for place, node in enumerate(model.graph):
        node.name = f"/{place}"
    with pytest.raises(ExportError, match=r"cannot be divided: .* no module's weight made it.*; --no-parts leaves"):
        make(model, folder / "model.safetensors", tmp_path)


def test_a_branch_that_there_is_not_is_refused(sd1: Exported, tmp_path: Path) -> None:
    folder = sd1.bundle / "unet"
    with pytest.raises(RequestError, match="branch 6"):
        make(ir.load(folder / "model.onnx"), folder / "model.safetensors", tmp_path, deep_cache=6)

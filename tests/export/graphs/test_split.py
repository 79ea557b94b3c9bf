"""Splitting a denoiser: the parts compute the same as the whole graph, and a defect in one of them is caught."""

from __future__ import annotations

import re
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
from latentrt_export.export_warning import ExportWarning
from latentrt_export.gates.verify import Run
from latentrt_export.graphs import split
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.part_writer import StructureError
from latentrt_export.graphs.passes.fuse_self_attention import DOMAIN
from latentrt_export.graphs.split import SplitWriter, describe_values, split_denoiser
from latentrt_export.graphs.trace import OPSET
from latentrt_export.modules.unet import UNet
from tests.export.graphs.split_graphs import Case, SplitGraphs, make_feeds, names, split_file, split_model
from tests.exported import Exported

GRAPHS = {"float32": ("sd1", "model"), "half": ("sd2", "model"), "half-weights": ("sd2", "model.float32")}
CASES = (
    Case(batch=2, height=8, width=8),
    Case(batch=3, height=5, width=7),
    Case(batch=1, height=11, width=6, tokens=154),
)


@pytest.fixture(scope="module", params=GRAPHS)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SplitGraphs:
    return split_file(graph_file(request, request.param), tmp_path_factory.mktemp("parts"))


def graph_file(request: pytest.FixtureRequest, graph: str) -> Path:
    family, name = GRAPHS[graph]
    exported: Exported = request.getfixturevalue(family)
    return exported.bundle / "unet" / f"{name}.onnx"


# Equal, not close: the parts compute the same operations on the same values.


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.batch}x{case.height}x{case.width}x{case.tokens}")
def test_parts_together_equal_the_whole(parts: SplitGraphs, case: Case) -> None:
    feeds = make_feeds(parts.whole, case)
    assert np.array_equal(parts.run_parts(feeds)["noise_pred"], parts.run("whole", feeds)["noise_pred"])


def test_a_whole_schedule_in_one_batch(parts: SplitGraphs) -> None:
    schedule = np.linspace(981, 1, 20, dtype=np.float32)
    at_once = parts.run("time_embedding", {"timestep": schedule})
    singly = [parts.run("time_embedding", {"timestep": schedule[[row]]}) for row in (0, 7, 19)]
    for name, values in at_once.items():
        # The order of sums in a product may differ with its rows: 2^-22 of the largest, in half 2^-10.
        expected = np.concatenate([row[name] for row in singly])
        bound = np.abs(expected).max() * (2**-10 if parts.in_half else 2**-22)
        assert np.abs(values[[0, 7, 19]] - expected).max() <= bound


def test_one_row_is_broadcast(parts: SplitGraphs) -> None:
    feeds = make_feeds(parts.whole, CASES[1])
    feeds["timestep"] = np.full(3, 401, np.float32)
    feeds["encoder_hidden_states"] = np.repeat(feeds["encoder_hidden_states"][:1], 3, axis=0)
    values = {name: array[:1] for name, array in parts.run_parts(feeds).items()}
    found = parts.run("body", {**values, "sample": feeds["sample"]})["noise_pred"]
    assert np.array_equal(found, parts.run("whole", feeds)["noise_pred"])


@pytest.mark.parametrize(
    ("graph", "branch"), [("float32", 0), ("float32", 2), ("float32", 5), ("half", 0), ("half-weights", 3)]
)
def test_shallow_equals_the_body_with_the_features_of_the_same_step(
    request: pytest.FixtureRequest, tmp_path: Path, graph: str, branch: int
) -> None:
    parts = split_file(graph_file(request, graph), tmp_path, branch)
    values = parts.run_parts(make_feeds(parts.whole, CASES[1]))
    shallow = parts.run("shallow_body", values)["noise_pred"]
    assert np.array_equal(shallow, values["noise_pred"])
    values["deep_features"] = values["deep_features"] * 1.5
    assert not np.array_equal(parts.run("shallow_body", values)["noise_pred"], shallow)


# Contents


def test_the_body_computes_nothing_from_the_timestep_or_the_prompt_alone(parts: SplitGraphs) -> None:
    body = parts["body"].graph
    assert not {"timestep", "encoder_hidden_states"} & set(names(body.inputs))
    outside = re.compile(r"(^time_|\.time_emb_proj|attn2\.to_[kv])")
    assert [name for name in body.initializers if outside.search(name)] == []
    assert [node.name for node in body if outside.search(str(node.name)) and node.op_type != "Cast"] == []
    given = set(names(body.inputs)) - {"sample"}
    kinds = {name.rpartition(".")[2] for name in given}
    assert kinds == {"time_emb_proj", "keys", "values"}
    # From these inputs alone, without the latents, nothing is computed but changes of layout and type.
    known = set(given)
    for node in body:
        if any(value.name in known for value in node.inputs if value is not None):
            others = {value.name for value in node.inputs if value is not None and value.const_value is None} - known
            assert others or node.op_type in {"Unsqueeze", "Cast"}, node.name
            known |= set() if others else set(names(node.outputs))


def test_every_weight_is_in_one_part(parts: SplitGraphs) -> None:
    stored = {name for name in parts.whole.graph.initializers if name.endswith((".weight", ".bias"))}
    owned = [stored & set(parts[name].graph.initializers) for name in ("time_embedding", "cross_attention_kv", "body")]
    assert sum(map(len, owned)) == len(stored)
    assert set().union(*owned) == stored
    assert all(re.search(r"^time_embedding\.|\.time_emb_proj\.", name) for name in owned[0])
    assert all(re.search(r"\.attn2\.to_[kv]\.weight$", name) for name in owned[1])
    # Together as many nodes as the whole, except casts and sizes, which are repeated where they are needed.
    for operator in ("Gemm", "MatMul", "Conv", "Softmax", "GroupNormalization", "LayerNormalization", "Add", "Gelu"):
        counts = {name: sum(node.op_type == operator for node in parts[name].graph) for name in ("whole", *parts.parts)}
        assert counts.pop("whole") == sum(counts.values()), operator


def test_shallow_has_the_shallow_layers_only(sd1: Exported) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    weights = [
        set(split_denoiser(model, UNet.loop_invariant_inputs, branch)["shallow_body"].graph.initializers)
        for branch in (0, 2, 5)
    ]
    blocks = [
        {match[0] for name in of if (match := re.match(r"(down|mid|up)_block\w*(\.\d)?", name))} for of in weights
    ]
    assert blocks[0] == {"up_blocks.2"}
    assert blocks[1] == {"down_blocks.0", "up_blocks.1", "up_blocks.2"}
    assert blocks[2] == {"down_blocks.0", "down_blocks.1", "down_blocks.2", "up_blocks.0", "up_blocks.1", "up_blocks.2"}
    assert all({"conv_in.weight", "conv_norm_out.weight", "conv_out.weight"} <= of for of in weights)
    last = {".".join(name.split(".")[2:4]) for name in weights[0] if name.startswith("up_blocks.2")}
    assert last == {"resnets.1", "attentions.1"}


# Signatures


def test_values_between_parts_are_named_after_modules(parts: SplitGraphs) -> None:
    weights = parts.whole.graph.initializers
    times = [name.removesuffix(".weight") for name in weights if name.endswith(".time_emb_proj.weight")]
    attentions = [name.removesuffix(".to_k.weight") for name in weights if name.endswith(".attn2.to_k.weight")]
    assert sorted(names(parts["time_embedding"].graph.outputs)) == sorted(times)
    assert sorted(names(parts["cross_attention_kv"].graph.outputs)) == sorted(
        f"{attention}.{kind}" for attention in attentions for kind in ("keys", "values")
    )
    passed = names(parts["time_embedding"].graph.outputs) + names(parts["cross_attention_kv"].graph.outputs)
    assert names(parts["body"].graph.inputs) == ["sample", *passed]


def test_values_between_parts_are_float32_with_a_named_first_axis(parts: SplitGraphs) -> None:
    for name, part in parts.parts.items():
        values = [*part.graph.inputs, *part.graph.outputs]
        assert {value.dtype for value in values} == {ir.DataType.FLOAT}, name
        for spec in describe_values(values):
            assert spec.shape[0] == ("timesteps" if name == "time_embedding" else "evaluations")
    shapes = {spec.name.rpartition(".")[2]: spec.shape for spec in describe_values(parts["body"].graph.inputs)}
    _, heads, width, tokens = shapes["keys"]
    assert shapes["values"] == ("evaluations", heads, tokens, width)
    assert tokens == "tokens"
    made = parts.run_parts(make_feeds(parts.whole, CASES[1]))
    sizes = {"evaluations": 3, "height": 5, "width": 7, "tokens": 77}
    for spec in describe_values([*parts["body"].graph.inputs, *parts["body"].graph.outputs]):
        assert made[spec.name].shape == tuple(sizes.get(str(size), size) for size in spec.shape)


def test_deep_features_of_a_lower_level_have_sides_of_their_own(sd1: Exported) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    shapes = [
        list(describe_values(split_denoiser(model, UNet.loop_invariant_inputs, branch)["body"].graph.outputs))[1].shape
        for branch in (0, 2)
    ]
    assert shapes[0] == ("evaluations", 16, "height", "width")
    assert shapes[1] == ("evaluations", 32, "deep_height", "deep_width")


# Other precisions, and graphs that cannot be split


def test_a_quantised_graph_is_split_like_any_other(sd1: Exported, tmp_path: Path) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    quantised = _quantised(model)
    assert quantised > 50
    parts = split_model(model, sd1.bundle / "unet" / "model.safetensors", tmp_path, 0)
    feeds = make_feeds(model, CASES[0])
    values, expected = parts.run_parts(feeds), parts.run("whole", feeds)["noise_pred"]
    assert np.array_equal(values["noise_pred"], expected)
    assert np.array_equal(parts.run("shallow_body", values)["noise_pred"], expected)
    assert sum(node.op_type == "QuantizeLinear" for name in parts.parts for node in parts[name].graph) > quantised


def _quantised(model: ir.Model) -> int:
    """Quantise the input of every product, as a quantised graph does; return their number."""
    scale = ir.Value(name="scale", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()))
    scale.const_value = ir.tensor(np.float32(0.05), name="scale")
    zero = ir.Value(name="zero", type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape(()))
    zero.const_value = ir.tensor(np.int8(0), name="zero")
    for value in (scale, zero):
        model.graph.initializers[str(value.name)] = value
    nodes = [node for node in model.graph if node.op_type in ("MatMul", "Gemm", "GroupNormalization")]
    for node in nodes:
        source = node.inputs[0]
        assert source is not None
        there = ir.node("QuantizeLinear", [source, scale, zero], name=f"{node.name}/QuantizeLinear")
        back = ir.node("DequantizeLinear", [there.outputs[0], scale, zero], name=f"{node.name}/DequantizeLinear")
        for made, dtype in ((there, ir.DataType.INT8), (back, ir.DataType.FLOAT)):
            made.outputs[0].name, made.outputs[0].shape = made.name, source.shape
            made.outputs[0].type = ir.TensorType(dtype)
            model.graph.insert_before(node, made)
        node.replace_input_with(0, back.outputs[0])
    return len(nodes)


def test_an_unknown_branch(sd1: Exported) -> None:
    with pytest.raises(RequestError, match="branch 6, expected"):
        split_denoiser(ir.load(sd1.bundle / "unet" / "model.onnx"), UNet.loop_invariant_inputs, 6)


def test_values_of_one_module_are_numbered(sd1: Exported, tmp_path: Path) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    for place, node in enumerate(model.graph):
        node.name = f"{node.name}.{place}".replace("attn2.to_v", "attn2.to_k")
    parts = split_model(model, sd1.bundle / "unet" / "model.safetensors", tmp_path)
    made = names(parts["cross_attention_kv"].graph.outputs)
    assert len(set(made)) == len(made)
    assert {name.rpartition(".attn2.")[2] for name in made} == {"keys", "keys.1"}
    feeds = make_feeds(model, CASES[0])
    assert np.array_equal(parts.run_parts(feeds)["noise_pred"], parts.run("whole", feeds)["noise_pred"])


def test_a_value_without_a_module_is_rejected(sd1: Exported) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    for node in model.graph:
        node.name = f"/{node.op_type}"
    with pytest.raises(ExportError, match="expected a value that a module's weight produced"):
        split_denoiser(model, UNet.loop_invariant_inputs)


def test_an_axis_without_a_name_is_rejected() -> None:
    value = ir.Value(name="keys", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", None, 4]))
    with pytest.raises(ExportError, match="keys of shape"):
        list(describe_values([value]))
    value.shape = ir.Shape([2, "tokens"])
    with pytest.raises(ExportError, match="expected a name for the first axis"):
        list(describe_values([value]))


Models = dict[PartName, ir.Model]


# Records in the manifest


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
    assert others == {"vae_decoder"}, "its slices are tested in test_slices.py"


def test_records_match_the_files(bundle: Bundle, unet: Component) -> None:
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
                assert [_describe(value) for value in values] == [(spec.name, spec.shape) for spec in specs]


def _describe(value: onnx.ValueInfoProto) -> tuple[str, tuple[int | str, ...]]:
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


def test_results_cover_all_shapes_and_meet_their_bounds(unet: Component) -> None:
    for name, part in unet.parts.items():
        for precision, record in part.graphs.items():
            shapes = [result.shapes for result in record.gate]
            assert shapes == [result.shapes for result in unet.graphs[precision].gate]
            for result in record.gate:
                assert (result.output, result.metric) == ("noise_pred", "relative")
                assert 0 <= result.value <= result.bound == split._BOUND
            if name == "shallow_body":
                # Exact: the same nodes as the body's on the same values.
                assert {result.value for result in record.gate} == {0.0}


# The gate


def write_parts(
    model: ir.Model,
    weights: Path,
    folder: Path,
    *,
    deep_cache: int | None = None,
) -> SplitWriter:
    shutil.copy(weights, folder / "model.safetensors")
    file = "model.float32.onnx"
    ir.save(model, folder / file)
    feeds = make_feeds(model, Case(batch=2, height=5, width=6))
    runs = [Run(feeds, Graph(folder / file).run(feeds))]
    phases: list[str] = []
    writer = SplitWriter(
        loop_invariant_inputs=UNet.loop_invariant_inputs,
        deep_cache=deep_cache,
        folder=folder,
        component="unet",
        notify=phases.append,
        required=deep_cache is not None,
    )
    record = GraphRecord(file=f"unet/{file}", opset=OPSET, nodes=len(model.graph))
    writer.write(model, record, "float16", runs)
    assert not writer.parts
    assert not phases
    writer.write(model, record, "float32", runs)
    assert phases == ["checking the parts of the float32 graph"]
    return writer


def test_parts_are_written_beside_the_graph(sd1: Exported, tmp_path: Path) -> None:
    folder = sd1.bundle / "unet"
    writer = write_parts(ir.load(folder / "model.onnx"), folder / "model.safetensors", tmp_path, deep_cache=3)
    assert set(writer.parts) == {"time_embedding", "cross_attention_kv", "body", "shallow_body"}
    for name, part in writer.parts.items():
        record = part.graphs["float32"]
        assert record.file == f"unet/{name}.float32.onnx"
        assert (tmp_path / f"{name}.float32.onnx").exists()
    assert [spec.name for spec in writer.parts["body"].outputs] == ["noise_pred", "deep_features"]


def other_weight(parts: Models) -> None:
    """Swap two key projections of the same shape."""
    weights = parts["cross_attention_kv"].graph.initializers
    one, two = (
        weights[f"up_blocks.{block}.attn2.to_k.weight"]
        for block in ("1.attentions.0.transformer_blocks.0", "1.attentions.1.transformer_blocks.0")
    )
    one.const_value, two.const_value = two.const_value, one.const_value


def swapped_names(parts: Models) -> None:
    """Swap the names of two values."""
    one, two = (value for value in parts["time_embedding"].graph.outputs if str(value.name).startswith("mid_block"))
    one.name, two.name = two.name, one.name


def not_finite(parts: Models) -> None:
    bias = parts["time_embedding"].graph.initializers["time_embedding.linear_2.bias"]
    bias.const_value = ir.tensor(np.full(bias.const_value.shape.numpy(), np.nan, np.float32), name=bias.name)  # type: ignore[union-attr]


def other_features(parts: Models) -> None:
    """Make `shallow_body` read the skip in place of the deep features."""
    graph = parts["shallow_body"].graph
    features = next(value for value in graph.inputs if value.name == "deep_features")
    (join,) = features.consumers()
    ir.convenience.replace_all_uses_with(features, join.inputs[1])  # type: ignore[arg-type]


def other_output(parts: Models) -> None:
    """Rename the output of `shallow_body`, which must not be compared with that of `body` in its place."""
    (output,) = (value for value in parts["shallow_body"].graph.outputs if value.name == "noise_pred")
    output.name = "other"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_output, "the float32 graph and its shallow body: noise_pred is missing"),
        (other_weight, r"the float32 graph and its parts together: noise_pred is .* \(relative\) from its own"),
        (swapped_names, "the float32 graph and its parts together: noise_pred is"),
        (not_finite, "noise_pred has values that are not finite"),
        (other_features, "the float32 graph and its shallow body: noise_pred is"),
    ],
)
def test_a_defect_in_a_part_is_caught(
    sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Models], None], message: str
) -> None:
    def split_and_spoil(*arguments: object) -> Models:
        parts = split_denoiser(*arguments)  # type: ignore[arg-type]
        spoil(parts)
        return parts

    monkeypatch.setattr(split, "split_denoiser", split_and_spoil)
    folder = sd1.bundle / "unet"
    with pytest.raises(GateError, match=message) as miss:
        write_parts(ir.load(folder / "model.onnx"), folder / "model.safetensors", tmp_path, deep_cache=0)
    assert "for inputs of shape {'sample': (2, 4, 5, 6)" in str(miss.value)
    assert "`parts=False`" in str(miss.value)


def test_a_denoiser_that_cannot_be_split_stays_whole_unless_a_part_was_asked_for(sd1: Exported, tmp_path: Path) -> None:
    folder = sd1.bundle / "unet"
    model = ir.load(folder / "model.onnx")
    for place, node in enumerate(model.graph):
        node.name = f"/{place}"
    with pytest.warns(ExportWarning) as warnings:
        writer = write_parts(model, folder / "model.safetensors", tmp_path)
    assert writer.parts == {}
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "model.float32.onnx"}
    (warning,) = [str(each.message) for each in warnings]
    assert warning.startswith("unet: the denoiser cannot be split (got ")
    assert SplitWriter.drawback in warning
    with pytest.raises(StructureError, match="deep_cache"):
        write_parts(model, folder / "model.safetensors", tmp_path, deep_cache=0)


def test_an_unknown_branch_is_not_written(sd1: Exported, tmp_path: Path) -> None:
    folder = sd1.bundle / "unet"
    with pytest.raises(RequestError, match="branch 6"):
        write_parts(ir.load(folder / "model.onnx"), folder / "model.safetensors", tmp_path, deep_cache=6)

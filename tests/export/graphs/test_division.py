"""The parts of a denoiser: together they are the whole to the bit, and nothing is left that could leave the loop."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from latentrt.errors import ExportError, RequestError
from latentrt_export.graphs.division import divide, signature
from latentrt_export.modules.unet import UNet
from tests.export.graphs.divided import Case, Divided, divided, divided_model, feeds_of, names
from tests.exported import Exported

GRAPHS = {"float32": ("sd1", "model"), "half": ("sd2", "model"), "half-weights": ("sd2", "model.float32")}
CASES = (
    Case(batch=2, height=8, width=8),
    Case(batch=3, height=5, width=7),
    Case(batch=1, height=11, width=6, tokens=154),
)


@pytest.fixture(scope="module", params=GRAPHS)
def parts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Divided:
    return divided(graph_file(request, request.param), tmp_path_factory.mktemp("parts"))


def graph_file(request: pytest.FixtureRequest, graph: str) -> Path:
    family, name = GRAPHS[graph]
    exported: Exported = request.getfixturevalue(family)
    return exported.bundle / "unet" / f"{name}.onnx"


# The same numbers. Equal, not near: they are the same operations on the same values.


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.batch}x{case.height}x{case.width}x{case.tokens}")
def test_together_they_are_the_whole(parts: Divided, case: Case) -> None:
    feeds = feeds_of(parts.whole, case)
    assert np.array_equal(parts.composed(feeds)["noise_pred"], parts.run("whole", feeds)["noise_pred"])


def test_a_whole_schedule_at_once(parts: Divided) -> None:
    schedule = np.linspace(981, 1, 20, dtype=np.float32)
    at_once = parts.run("time_embedding", {"timestep": schedule})
    singly = [parts.run("time_embedding", {"timestep": schedule[[row]]}) for row in (0, 7, 19)]
    for name, values in at_once.items():
        # The order of sums in a product may differ with its rows: 2^-22 of the largest, in half 2^-10.
        expected = np.concatenate([row[name] for row in singly])
        bound = np.abs(expected).max() * (2**-10 if parts.in_half else 2**-22)
        assert np.abs(values[[0, 7, 19]] - expected).max() <= bound


def test_one_row_may_stand_for_all_where_broadcasting_does(parts: Divided) -> None:
    feeds = feeds_of(parts.whole, CASES[1])
    feeds["timestep"] = np.full(3, 401, np.float32)
    feeds["encoder_hidden_states"] = np.repeat(feeds["encoder_hidden_states"][:1], 3, axis=0)
    values = {name: array[:1] for name, array in parts.composed(feeds).items()}
    found = parts.run("body", {**values, "sample": feeds["sample"]})["noise_pred"]
    assert np.array_equal(found, parts.run("whole", feeds)["noise_pred"])


@pytest.mark.parametrize(
    ("graph", "branch"), [("float32", 0), ("float32", 2), ("float32", 5), ("half", 0), ("half-weights", 3)]
)
def test_with_the_features_of_the_same_step_shallow_is_the_loop(
    request: pytest.FixtureRequest, tmp_path: Path, graph: str, branch: int
) -> None:
    parts = divided(graph_file(request, graph), tmp_path, branch)
    values = parts.composed(feeds_of(parts.whole, CASES[1]))
    shallow = parts.run("shallow_body", values)["noise_pred"]
    assert np.array_equal(shallow, values["noise_pred"])
    values["deep_features"] = values["deep_features"] * 1.5
    assert not np.array_equal(parts.run("shallow_body", values)["noise_pred"], shallow)


# What has left


def test_nothing_of_the_timestep_or_the_prompt_is_left(parts: Divided) -> None:
    loop = parts["body"].graph
    assert not {"timestep", "encoder_hidden_states"} & set(names(loop.inputs))
    outside = re.compile(r"(^time_|\.time_emb_proj|attn2\.to_[kv])")
    assert [name for name in loop.initializers if outside.search(name)] == []
    assert [node.name for node in loop if outside.search(str(node.name)) and node.op_type != "Cast"] == []
    given = set(names(loop.inputs)) - {"sample"}
    kinds = {name.rpartition(".")[2] for name in given}
    assert kinds == {"time_emb_proj", "keys", "values"}
    # From what is given alone, without the latents, nothing is computed: it is only laid out for its user.
    known = set(given)
    for node in loop:
        if any(value.name in known for value in node.inputs if value is not None):
            others = {value.name for value in node.inputs if value is not None and value.const_value is None} - known
            assert others or node.op_type in {"Unsqueeze", "Cast"}, node.name
            known |= set() if others else set(names(node.outputs))


def test_every_weight_is_in_one_part(parts: Divided) -> None:
    stored = {name for name in parts.whole.graph.initializers if name.endswith((".weight", ".bias"))}
    owned = [stored & set(parts[name].graph.initializers) for name in ("time_embedding", "cross_attention_kv", "body")]
    assert sum(map(len, owned)) == len(stored)
    assert set().union(*owned) == stored
    assert all(re.search(r"^time_embedding\.|\.time_emb_proj\.", name) for name in owned[0])
    assert all(re.search(r"\.attn2\.to_[kv]\.weight$", name) for name in owned[1])
    # Together as many nodes as the whole, but for casts and sizes, which are made again where they are needed.
    for operator in ("Gemm", "MatMul", "Conv", "Softmax", "GroupNormalization", "LayerNormalization", "Add", "Gelu"):
        counts = {name: sum(node.op_type == operator for node in parts[name].graph) for name in ("whole", *parts.parts)}
        assert counts.pop("whole") == sum(counts.values()), operator


def test_shallow_has_the_shallow_layers_only(sd1: Exported) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    weights = [
        set(divide(model, UNet.loop_invariant_inputs, branch)["shallow_body"].graph.initializers)
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


def test_names_are_the_modules(parts: Divided) -> None:
    weights = parts.whole.graph.initializers
    times = [name.removesuffix(".weight") for name in weights if name.endswith(".time_emb_proj.weight")]
    attentions = [name.removesuffix(".to_k.weight") for name in weights if name.endswith(".attn2.to_k.weight")]
    assert sorted(names(parts["time_embedding"].graph.outputs)) == sorted(times)
    assert sorted(names(parts["cross_attention_kv"].graph.outputs)) == sorted(
        f"{attention}.{kind}" for attention in attentions for kind in ("keys", "values")
    )
    handed = names(parts["time_embedding"].graph.outputs) + names(parts["cross_attention_kv"].graph.outputs)
    assert names(parts["body"].graph.inputs) == ["sample", *handed]


def test_what_is_handed_over_is_float32_with_the_batch_first(parts: Divided) -> None:
    for name, part in parts.parts.items():
        values = [*part.graph.inputs, *part.graph.outputs]
        assert {value.dtype for value in values} == {ir.DataType.FLOAT}, name
        for spec in signature(values):
            assert spec.shape[0] == ("timesteps" if name == "time_embedding" else "evaluations")
    handed = {spec.name.rpartition(".")[2]: spec.shape for spec in signature(parts["body"].graph.inputs)}
    _, heads, width, tokens = handed["keys"]
    assert handed["values"] == ("evaluations", heads, tokens, width)
    assert tokens == "tokens"
    made = parts.composed(feeds_of(parts.whole, CASES[1]))
    sizes = {"evaluations": 3, "height": 5, "width": 7, "tokens": 77}
    for spec in signature([*parts["body"].graph.inputs, *parts["body"].graph.outputs]):
        assert made[spec.name].shape == tuple(sizes.get(str(size), size) for size in spec.shape)


def test_deep_features_of_a_lower_level_have_sides_of_their_own(sd1: Exported) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    shapes = [
        list(signature(divide(model, UNet.loop_invariant_inputs, branch)["body"].graph.outputs))[1].shape
        for branch in (0, 2)
    ]
    assert shapes[0] == ("evaluations", 16, "height", "width")
    assert shapes[1] == ("evaluations", 32, "deep_height", "deep_width")


# Another precision, and what cannot be divided


def test_a_quantised_graph_is_divided_like_any_other(sd1: Exported, tmp_path: Path) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    quantised = _quantised(model)
    assert quantised > 50
    parts = divided_model(model, sd1.bundle / "unet" / "model.safetensors", tmp_path, 0)
    feeds = feeds_of(model, CASES[0])
    values, expected = parts.composed(feeds), parts.run("whole", feeds)["noise_pred"]
    assert np.array_equal(values["noise_pred"], expected)
    assert np.array_equal(parts.run("shallow_body", values)["noise_pred"], expected)
    assert sum(node.op_type == "QuantizeLinear" for name in parts.parts for node in parts[name].graph) > quantised


def _quantised(model: ir.Model) -> int:
    """Round what enters every product to eight bits, as a quantised graph does; return how often."""
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


def test_a_branch_that_there_is_not(sd1: Exported) -> None:
    with pytest.raises(RequestError, match="branch 6, expected"):
        divide(ir.load(sd1.bundle / "unet" / "model.onnx"), UNet.loop_invariant_inputs, 6)


def test_two_values_of_one_name_are_refused(sd1: Exported) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    for node in model.graph:
        node.name = str(node.name).replace("attn2.to_v", "attn2.to_k")
    with pytest.raises(ExportError, match=r"two values .* would be called down_blocks\.0\..*\.attn2\.keys"):
        divide(model, UNet.loop_invariant_inputs)


def test_a_value_of_no_module_is_refused(sd1: Exported) -> None:
    model = ir.load(sd1.bundle / "unet" / "model.onnx")
    for node in model.graph:
        node.name = f"/{node.op_type}"
    with pytest.raises(ExportError, match="leaves the loop, but no module's weight made it"):
        divide(model, UNet.loop_invariant_inputs)


def test_an_axis_without_a_name_is_refused() -> None:
    value = ir.Value(name="keys", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch", None, 4]))
    with pytest.raises(ExportError, match="keys has the shape"):
        list(signature([value]))
    value.shape = ir.Shape([2, 4])
    with pytest.raises(ExportError, match="expected a name and then"):
        list(signature([value]))

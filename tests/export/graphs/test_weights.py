"""Stored weights equal the checkpoint's, graphs refer to them, and a graph depends on the architecture alone."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.graph_attributes import ATTRIBUTES
from latentrt.bundle.graph_shapes import INPUT_COUNTS, OPERATORS
from latentrt.bundle.manifest import LatentSpace
from latentrt.bundle.onnx_graph import Tensor as OnnxTensor
from latentrt.bundle.onnx_types import ELEMENT_TYPES
from latentrt_export.component import export_component
from latentrt_export.families.plan import ComponentPlan
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.weights import store
from latentrt_export.modules.module import ComponentModule
from latentrt_export.modules.text_encoder import TextEncoder
from tests.exported import Exported
from tests.tiny import text_encoder, write_tokenizer

PARTS = {
    "text_encoder": "text_encoder",
    "vae_encoder": "vae",
    "vae_decoder": "vae",
    "unet": "unet",
    "safety_checker": "safety_checker",
}


def test_attributes_are_those_of_onnx() -> None:
    types = {int: "INT", float: "FLOAT", bytes: "STRING", tuple: "INTS", OnnxTensor: "TENSOR"}
    for op_type, attributes in ATTRIBUTES.items():
        if op_type == "MultiHeadAttention":
            continue  # of ONNX Runtime
        known = onnx.defs.get_schema(op_type, 21).attributes
        for name, expected in attributes.items():
            each = expected if isinstance(expected, type) else type(expected[0])
            assert known[name].type == getattr(onnx.defs.OpSchema.AttrType, types[each]), (op_type, name)
            if isinstance(expected, tuple) and known[name].default_value.name:
                assert onnx.helper.get_attribute_value(known[name].default_value) in expected, (op_type, name)


def test_numbers_of_inputs_are_those_of_onnx() -> None:
    for (domain, op_type), count in INPUT_COUNTS.items():
        if domain == "":
            known = onnx.defs.get_schema(op_type, 21)
            assert count == (known.min_input, known.max_input), op_type
    assert INPUT_COUNTS.keys() == OPERATORS


def test_the_codes_of_types_are_those_of_onnx() -> None:
    for code, each in ELEMENT_TYPES.items():
        assert ir.DataType(code).numpy() == np.dtype(each.dtype), each
        assert code == onnx.helper.np_dtype_to_tensor_dtype(np.dtype(each.name)), each


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("component", PARTS)
def test_weights_equal_the_checkpoints(request: pytest.FixtureRequest, family: str, component: str) -> None:
    exported: Exported = request.getfixturevalue(family)
    record = Bundle.open(exported.bundle).manifest.components[component]
    stored = load_file(exported.bundle / record.weights.file)
    original = checkpoint_tensors(exported.checkpoint / PARTS[component])
    assert record.weights.tensors == len(stored)
    assert record.weights.parameters == sum(tensor.numel() for tensor in stored.values())
    for name, tensor in stored.items():
        assert tensor.dtype == original[name].dtype
        assert torch.equal(tensor, original[name]), name
    if component in ("text_encoder", "unet"):
        assert stored.keys() == {name for name in original if not name.endswith("position_ids")}


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_encoder_and_decoder_have_all_weights_of_the_autoencoder(request: pytest.FixtureRequest, family: str) -> None:
    exported: Exported = request.getfixturevalue(family)
    halves = [load_file(exported.bundle / name / "model.safetensors").keys() for name in ("vae_encoder", "vae_decoder")]
    assert halves[0] | halves[1] == checkpoint_tensors(exported.checkpoint / "vae").keys()
    assert not halves[0] & halves[1]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("component", PARTS)
def test_every_stored_weight_is_an_initializer_of_every_graph(
    request: pytest.FixtureRequest, family: str, component: str
) -> None:
    exported: Exported = request.getfixturevalue(family)
    record = Bundle.open(exported.bundle).manifest.components[component]
    names = load_file(exported.bundle / record.weights.file).keys()
    for graph in record.graphs.values():
        model = onnx.load(exported.bundle / graph.file, load_external_data=False)
        outside = {
            tensor.name for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        assert outside == names


def test_weights_have_the_permissions_of_other_files(sd1: Exported) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in sd1.bundle.rglob("*") if path.is_file()}
    assert len(modes) == 1, "safetensors writes files for their owner alone"


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_references_read_back_equal_through_onnxruntime(tmp_path: Path, precision: Any) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"layer.{number}.weight": rng.normal(size=(number, 3)).astype(np.float32) for number in (1, 2, 7)}
    arrays["layer.bias"] = rng.normal(size=5).astype(np.float32)
    weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    weights["transposed"] = torch.from_numpy(arrays["layer.7.weight"]).T
    stored = store(Holder(weights).weights(), tmp_path / "model.safetensors", precision)
    found = read_through_onnxruntime(tmp_path, {name: stored.external(name) for name in weights})
    for name, tensor in weights.items():
        assert np.array_equal(found[name], tensor.numpy().astype(precision)), name


class Holder(ComponentModule):
    """A module of these weights."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = tuple(weights)
        self.held = torch.nn.ParameterList(weights.values())

    def canonical_name(self, parameter: str) -> str:
        return self.names[int(parameter.removeprefix("held."))]


def read_through_onnxruntime(folder: Path, tensors: dict[str, ir.ExternalTensor]) -> dict[str, NDArray[Any]]:
    """Read tensors as the outputs of a graph that returns its initializers."""
    values, nodes = [], []
    for name, tensor in tensors.items():
        values.append(ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor))
        nodes.append(ir.node("Identity", [values[-1]]))
        output = nodes[-1].outputs[0]
        output.name, output.type, output.shape = f"{name}/out", ir.TensorType(tensor.dtype), tensor.shape
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 21}, name="all")
    ir.save(ir.Model(graph, ir_version=10), folder / "model.onnx")
    found = Graph(folder / "model.onnx").run({})
    return {name: found[f"{name}/out"] for name in tensors}


def test_graphs_of_one_architecture_are_the_same_bytes(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path / "tokenizer", "sd1", "bpe")
    arrays = {
        "tokens:text_encoder": np.random.default_rng(0).integers(0, len(ids), (4, 77)),
        "option:clip_skip": np.array(1),
    }
    plan = ComponentPlan(
        name="text_encoder",
        role="text-encoder",
        module="",
        weights="text_encoder",
        sources={"input_ids": "tokens", "clip_skip": "option:clip_skip"},
    )
    space = LatentSpace(channels=4, downscale=8, scale=0.18215)
    graphs: list[dict[str, bytes]] = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        module = TextEncoder(text_encoder("sd1", ids, 1)).requires_grad_(False)
        folder = tmp_path / f"{seed} elsewhere"
        export_component(module, plan, folder, "float16", arrays, space, lambda text: None)
        graphs.append({file.name: file.read_bytes() for file in folder.iterdir()})
    first, second = graphs
    assert first.keys() == {"model.onnx", "model.float32.onnx", "model.safetensors"} == second.keys()
    assert first["model.onnx"] == second["model.onnx"]
    assert first["model.float32.onnx"] == second["model.float32.onnx"]
    assert first["model.safetensors"] != second["model.safetensors"]

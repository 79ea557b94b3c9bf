"""The graphs of exported bundles: names, axes and signatures; and the tracer's own promises on a small module."""

from __future__ import annotations

import getpass
import socket
from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Component, GraphRecord
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import ExportError
from latentrt_export.graphs.trace import OPSET, hide_weights, trace
from latentrt_export.modules.module import ComponentModule, Shapes
from tests.exported import Exported

COMPONENTS = ("text_encoder", "vae_encoder", "vae_decoder", "unet", "safety_checker")
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16}
DTYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
# Constants of a graph: epsilons, scales, the sines' frequencies, the mask of 77 × 77 tokens, CLIP's means.
MAX_CONSTANT = 77 * 77


class Subject:
    """One component of one bundle and the graphs it has."""

    def __init__(self, exported: Exported, name: str) -> None:
        bundle = Bundle.open(exported.bundle)
        self.exported, self.name = exported, name
        self.component: Component = bundle.manifest.components[name]
        self.graphs: list[tuple[GraphRecord, onnx.ModelProto]] = [
            (record, onnx.load(exported.bundle / record.file, load_external_data=False))
            for record in self.component.graphs.values()
        ]


@pytest.fixture(
    scope="module", params=[(family, name) for family in ("sd1", "sd2") for name in COMPONENTS], ids="-".join
)
def subject(request: pytest.FixtureRequest) -> Subject:
    family, name = request.param
    return Subject(request.getfixturevalue(family), name)


def test_graphs_are_valid(subject: Subject) -> None:
    for record, model in subject.graphs:
        onnx.checker.check_model(str(subject.exported.bundle / record.file), full_check=True)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
        assert record.opset == OPSET
        assert record.nodes == len(model.graph.node)


def test_signatures_match_the_manifest(subject: Subject) -> None:
    for _, model in subject.graphs:
        for values, specs in (
            (model.graph.input, subject.component.inputs),
            (model.graph.output, subject.component.outputs),
        ):
            assert [_described(value) for value in values] == [(s.name, DTYPES[s.dtype], s.shape) for s in specs]


def _described(value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | str, ...]]:
    tensor = value.type.tensor_type
    sizes = tuple(axis.dim_param or axis.dim_value for axis in tensor.shape.dim)
    return value.name, tensor.elem_type, sizes


def test_axes_have_the_four_names(subject: Subject) -> None:
    sizes = {
        str(size).split("*")[-1]
        for spec in (*subject.component.inputs, *subject.component.outputs)
        for size in spec.shape
        if isinstance(size, str)
    }
    allowed = {
        "text_encoder": {"chunks"},
        "unet": {"evaluations", "height", "width", "tokens"},
        "safety_checker": {"images", "pixel_height", "pixel_width"},
    }
    assert sizes == allowed.get(subject.name, {"batch", "height", "width"})


def test_graphs_contain_nothing_of_the_machine(subject: Subject) -> None:
    fragments = [str(Path.home()), str(Path(torch.__file__).parent.parent), str(Path(__file__).parents[2])]
    fragments += ["site-packages", ".py", "Traceback", socket.gethostname(), str(subject.exported.checkpoint)]
    fragments += [getpass.getuser()] if getpass.getuser() != "root" else []
    for record, _ in subject.graphs:
        data = (subject.exported.bundle / record.file).read_bytes()
        assert [fragment for fragment in fragments if fragment.encode() in data] == []


def test_nodes_have_names_that_name_their_module(subject: Subject) -> None:
    for _, model in subject.graphs:
        counts = Counter(node.name for node in model.graph.node)
        assert [name for name, count in counts.items() if count > 1 or "/" not in name] == []
        assert not any("hook" in name for name in counts)
        assert all(not node.doc_string and not node.metadata_props for node in model.graph.node)
    known = {"text_encoder": "layers.0.self_attn", "unet": "attn1.to_q", "safety_checker": "self_attn.q_proj"}
    part = known.get(subject.name, "mid_block.resnets.0.conv1")
    assert any(part in node.name for node in subject.graphs[0][1].graph.node)


def test_values_have_one_name_each(subject: Subject) -> None:
    for _, model in subject.graphs:
        graph = model.graph
        names = [value.name for value in (*graph.input, *graph.initializer)]
        names += [name for node in graph.node for name in node.output if name]
        assert [name for name, count in Counter(names).items() if count > 1] == []


def test_graphs_are_small_and_hold_no_weights(subject: Subject) -> None:
    for record, model in subject.graphs:
        inside = [tensor for tensor in model.graph.initializer if tensor.data_location != TensorProto.EXTERNAL]
        assert all(int(np.prod(tensor.dims)) <= MAX_CONSTANT for tensor in inside)
        # Nothing inside is named as a weight is.
        assert not [tensor.name for tensor in inside if tensor.name.endswith((".weight", ".bias"))]
        # A tiny model has as many nodes as a large one per layer: names and shapes take 1 kB for each.
        assert (subject.exported.bundle / record.file).stat().st_size < 1024 * record.nodes


def test_passes_were_applied(subject: Subject) -> None:
    for _, model in subject.graphs:
        assert "IsNaN" not in {node.op_type for node in model.graph.node}
        swaps = [tuple(node.attribute[0].ints) for node in model.graph.node if node.op_type == "Transpose"]
        if subject.name in ("text_encoder", "unet"):
            assert swaps.count((0, 1, 3, 2)) == sum(node.op_type == "Softmax" for node in model.graph.node)


# The tracer


class Small(ComponentModule):
    """Two layers, one of which may go unused."""

    trace_shapes: ClassVar[Shapes] = {"batch": 3}

    def __init__(self, *, waste: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.waste = nn.Linear(4, 4), nn.Linear(4, 4), waste
        self.inputs = (TensorSpec("x", "float32", ("batch", 4)),)
        self.outputs = (TensorSpec("y", "float32", ("batch", 4)),)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.first(x) if self.waste else self.second(self.first(x))
        return made

    def canonical_name(self, parameter: str) -> str:
        return parameter.replace("first", "renamed")


FEEDS = {"x": np.ones((3, 4), np.float32)}


def test_weights_are_initializers_under_their_canonical_names() -> None:
    module = Small().eval()
    model = trace(module, FEEDS)
    assert set(module.weights()) == {"renamed.weight", "renamed.bias", "second.weight", "second.bias"}
    for name, weight in module.weights().items():
        assert np.array_equal(model.graph.initializers[name].const_value.numpy(), weight.numpy())  # type: ignore[union-attr]


def test_an_unused_weight_is_rejected() -> None:
    with pytest.raises(ExportError, match=r"2 weights are missing .* second\.bias"):
        trace(Small(waste=True).eval(), FEEDS)


def test_a_wrong_signature_is_rejected() -> None:
    module = Small().eval()
    module.outputs = (TensorSpec("y", "float32", ("batch", 2, 2)),)
    with pytest.raises(ExportError, match="as in the signature"):
        trace(module, FEEDS)


def test_hidden_weights_come_back() -> None:
    model = trace(Small().eval(), FEEDS)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    with hide_weights(model, set(before)):
        assert not model.graph.initializers
        assert [value.name for value in model.graph.inputs] == ["x", *before]
    assert {name: value.const_value for name, value in model.graph.initializers.items()} == before
    assert [value.name for value in model.graph.inputs] == ["x"]


class Resized(ComponentModule):
    """Latents and an image of twice their sides."""

    trace_shapes: ClassVar[Shapes] = {"batch": 3, "height": 5, "width": 7}

    def __init__(self) -> None:
        super().__init__()
        self.inputs = (
            TensorSpec("latents", "float32", ("batch", 1, "height", "width")),
            TensorSpec("image", "float32", ("batch", 1, "2*height", "2*width")),
        )
        self.outputs = (TensorSpec("y", "float32", ("batch", 1, "height", "width")),)

    def forward(self, latents: Tensor, image: Tensor) -> Tensor:
        return latents * image[:, :, ::2][:, :, :, ::2]


def test_an_axis_and_its_multiple_are_two_axes_of_every_tensor() -> None:
    """ONNX Runtime reuses the memory of tensors whose axes have the same names."""
    module = Resized().eval()
    feeds = {"latents": np.ones((3, 1, 5, 7), np.float32), "image": np.ones((3, 1, 10, 14), np.float32)}
    model = trace(module, feeds)
    rows = next(node.outputs[0].shape for node in model.graph if node.op_type == "Slice")
    # (3, 1, 5, 14), of which the last is not the width of the latents, 7.
    assert rows is not None
    assert str(rows[3]) not in ("width", "height")

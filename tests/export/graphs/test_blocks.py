"""Blocks that are traced once, and normalisations that are traced as operators, give the graph of their module."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from latentrt.bundle.tensors import TensorSpec
from latentrt_export.graphs import trace as tracer
from latentrt_export.graphs.blocks import Blocks, _describe, call_blocks
from latentrt_export.graphs.trace import trace
from latentrt_export.modules.module import Arrays, ComponentModule
from latentrt_export.modules.streamed import stand_in_weights
from tests.export.small_graph import run


class Network(ComponentModule):
    """Transformer blocks of two kinds, between layers of its own."""

    def __init__(self, **last: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 4, "cross_attention_dim": 6}
        self.first = nn.Linear(8, 8)
        kinds = (options, options, {**options, **last})
        self.blocks = nn.ModuleList([BasicTransformerBlock(8, **each) for each in kinds])
        self.norm = nn.GroupNorm(2, 8)
        self.inputs = (
            TensorSpec("x", "float32", ("batch", "tokens", 8)),
            TensorSpec("text", "float32", ("batch", "words", 6)),
        )
        self.outputs = (TensorSpec("y", "float32", ("batch", 8, "tokens")),)
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden, encoder_hidden_states=text)
        normed: Tensor = self.norm(hidden.transpose(1, 2))
        return normed

    def canonical_name(self, parameter: str) -> str:
        return parameter.replace("blocks.", "layers.")


def feeds(batch: int, tokens: int, words: int) -> Arrays:
    rng = np.random.default_rng(0)
    shapes = {"x": (batch, tokens, 8), "text": (batch, words, 6)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def meet(module: nn.Module) -> Blocks:
    """Trace a network and return the blocks that the trace has met."""
    found: list[Blocks] = []

    @contextlib.contextmanager
    def remember(module: nn.Module) -> Iterator[Blocks]:
        with call_blocks(module) as blocks:
            found.append(blocks)
            yield blocks

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracer, "call_blocks", remember)
        trace(module, feeds(2, 5, 7))  # type: ignore[arg-type]
    return found[0]


@pytest.fixture(scope="module")
def traced() -> ir.Model:
    """The graph of `Network`."""
    return trace(Network(), feeds(2, 5, 7))


@pytest.mark.parametrize("sizes", [(1, 6, 3), (3, 2, 9), (2, 16, 16)])
def test_the_graph_computes_what_the_network_does(
    traced: ir.Model, tmp_path: Path, sizes: tuple[int, int, int]
) -> None:
    found = run(traced, tmp_path, feeds(*sizes))["y"]
    expected = Network().torch_outputs(feeds(*sizes))["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # float32 sums in another order


def test_weights_and_nodes_have_the_names_of_their_own_block(traced: ir.Model) -> None:
    graph, weights = traced.graph, Network().weights()
    assert {*weights} == {name for name in graph.initializers if name.endswith(("weight", "bias"))}
    for name, tensor in weights.items():
        assert np.array_equal(graph.initializers[name].const_value.numpy(), tensor.numpy())  # type: ignore[union-attr]
    for index in range(3):
        products = [node for node in graph if node.name == f"blocks.{index}.attn1.to_q/MatMul"]
        assert len(products) == 1
        transposed = products[0].inputs[1]
        assert transposed is not None
        assert transposed.producer() is not None
    values = [value.name for node in graph for value in node.outputs]
    assert len({*values}) == len(values)
    assert len({node.name for node in graph}) == len(graph)
    assert not any(node.domain for node in graph)


def test_equal_blocks_are_traced_once() -> None:
    assert len(meet(Network(activation_fn="gelu")).kinds) == 2


@pytest.mark.parametrize(
    ("last", "kinds"),
    [({}, 1), ({"activation_fn": "gelu"}, 2), ({"norm_eps": 1e-3}, 2), ({"num_attention_heads": 1}, 2)],
)
def test_a_kind_is_everything_but_the_values_of_weights(last: dict[str, Any], kinds: int) -> None:
    assert len({_describe(block) for block in Network(**last).blocks}) == kinds


def test_a_block_with_a_hook_stays_in_the_network() -> None:
    network = Network()
    network.get_submodule("blocks.1.attn1").register_forward_hook(lambda *_: None)
    with call_blocks(network):
        assert ["forward" in vars(block) for block in network.blocks] == [True, False, True]
    assert not any("forward" in vars(block) for block in network.blocks)


def test_outside_of_a_trace_a_block_is_itself() -> None:
    network = Network()
    expected = network.torch_outputs(feeds(1, 3, 2))["y"]
    with call_blocks(network):
        assert np.array_equal(network.torch_outputs(feeds(1, 3, 2))["y"], expected)


def test_normalizations_are_one_node_each(traced: ir.Model) -> None:
    kinds = [node.op_type for node in traced.graph if "Normalization" in node.op_type]
    assert sorted(kinds) == ["GroupNormalization"] + ["LayerNormalization"] * 9


class Plain(ComponentModule):
    """A norm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 4, affine=False)
        self.last = nn.Conv2d(4, 1, 1)
        self.inputs = (TensorSpec("x", "float32", ("batch", 4, "height", "width")),)
        self.outputs = (TensorSpec("y", "float32", ("batch", 1, "height", "width")),)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(self.norm(x))
        return made

    def canonical_name(self, parameter: str) -> str:
        return parameter


def test_a_norm_without_weights_is_traced_as_torch_does(tmp_path: Path) -> None:
    module = Plain().eval().requires_grad_(False)
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)
    model = trace(module, {"x": np.ones((2, 4, 6, 5), np.float32)})
    np.testing.assert_allclose(run(model, tmp_path, {"x": x})["y"], module.torch_outputs({"x": x})["y"], atol=1e-5)


def test_a_trace_reads_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(parameter: Tensor) -> Tensor:
        raise AssertionError("a trace reads weights")

    monkeypatch.setattr(tracer, "read_parameter", refuse)
    network = Network()
    graph = trace(network, feeds(2, 5, 7)).graph
    assert isinstance(graph.initializers["first.weight"].const_value, ir.LazyTensor)
    with stand_in_weights(network):
        assert type(network.first.weight.data).__name__ == "FakeTensor"

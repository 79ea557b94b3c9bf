"""Traces a network's repeated blocks once.

Most of a large network is one block many times over, with other weights: the transformer blocks of a UNet, the layers
of a text encoder. Tracing and rewriting them takes most of an export's time, and gives the same nodes each time. So the
network is traced with each block as one node (`call_blocks`), one block of each kind is traced by itself, and its nodes
are inserted where the blocks are (`insert_blocks`).

Two blocks are of one kind if nothing but the values of their weights differs: their classes, attributes, children,
buffers and the arguments that they are called with. The axes of a kind's inputs are traced as independent wherever they
are free in the network.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

__all__ = ["BlockCalls", "Blocks", "Kind", "call_blocks", "insert_blocks", "separate_blocks"]

_DOMAIN, _OPERATOR = "latentrt.trace", "Block"


def _keep_shape(block: nn.Module, hidden_states: Tensor) -> Sequence[Any]:
    return hidden_states.shape


def _change_channels(block: Any, hidden_states: Tensor) -> Sequence[Any]:
    batch, _, height, width = hidden_states.shape
    return batch, block.out_channels, height, width


# Class → the shape of its output for its first input.
_SHAPES: dict[type[nn.Module], Callable[[Any, Tensor], Sequence[Any]]] = {
    BasicTransformerBlock: _keep_shape,
    CLIPEncoderLayer: _keep_shape,
    ResnetBlock2D: _change_channels,
}
# A sampling block changes the sides, and is rare.
_RESAMPLING = ("up", "down")
# Attributes of `nn.Module` itself, which `_describe` looks at separately or which change nothing in an evaluation.
_OWN_STATE = frozenset(vars(nn.Module()))


@dataclass(kw_only=True)
class Kind:
    """A kind of block.

    Attributes:
        block: one of its blocks.
        arguments: its arguments; `None` stands for the tensors among them, in the order of the node's inputs.
        tensors: the names of the arguments that are tensors.
        sizes: the sizes of the tensors' axes in the network, a number or the formula of a free axis.
    """

    block: nn.Module
    arguments: dict[str, Any]
    tensors: tuple[str, ...]
    sizes: tuple[tuple[int | str, ...], ...]


@dataclass
class Blocks:
    """The blocks that a trace has met: kinds by number, in the order of their first block."""

    kinds: list[Kind] = field(default_factory=list)
    _numbers: dict[str, int] = field(default_factory=dict)

    def find(self, key: str, make: Callable[[], Kind]) -> int:
        """Return the number of a kind, which is made at its first block."""
        if key not in self._numbers:
            self._numbers[key] = len(self.kinds)
            self.kinds.append(make())
        return self._numbers[key]


@contextmanager
def call_blocks(module: nn.Module) -> Iterator[Blocks]:
    """Make a trace of a module contain one node for each block.

    Yields:
        The blocks that the trace meets inside the `with` block.
    """
    blocks, patched = Blocks(), list[nn.Module]()
    for path, each in module.named_modules():
        if (
            type(each) in _SHAPES
            and not any(getattr(each, name, False) for name in _RESAMPLING)
            and not _is_hooked(each)
        ):
            each.forward = partial(_call, blocks, _describe(each), path, each, each.forward)
            patched.append(each)
    try:
        yield blocks
    finally:
        for each in patched:
            del each.forward


def _is_hooked(block: nn.Module) -> bool:
    return any(each._forward_hooks or each._forward_pre_hooks for each in block.modules())


def _describe(value: Any) -> str:
    """Return a text that is equal for two blocks if they differ in the values of their weights alone."""
    return hashlib.sha256(repr(_list_facts(value)).encode()).hexdigest()


def _list_facts(value: Any) -> Any:
    match value:
        case nn.Module():
            attributes = {name: each for name, each in vars(value).items() if name not in _OWN_STATE}
            return (
                _name_type(value),
                value.training,
                {name: None if each is None else tuple(each.shape) for name, each in value._parameters.items()},
                {name: _list_facts(each) for name, each in value._buffers.items()},
                {name: _list_facts(each) for name, each in sorted(attributes.items())},
                {name: _list_facts(each) for name, each in value._modules.items()},
            )
        case Tensor():
            return value.dtype, tuple(value.shape), hashlib.sha256(value.numpy().tobytes()).hexdigest()
        case None | bool() | int() | float() | str() | torch.dtype() | torch.device():
            return repr(value)
        case list() | tuple():
            return [_list_facts(each) for each in value]
        case dict():
            return {str(name): _list_facts(each) for name, each in value.items()}
        case _ if _name_type(value).startswith("diffusers.models.attention_processor."):
            return _name_type(value), _list_facts(vars(value))
        case _:
            return id(value)  # a configuration, which all blocks share, or something unknown


def _name_type(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _call(
    blocks: Blocks, key: str, path: str, block: nn.Module, forward: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    """Take the place of a block's `forward`: return the output of a node that stands for the block."""
    bound = inspect.signature(forward).bind(*args, **kwargs)
    given = dict(bound.arguments)
    rest = [name for name, each in bound.signature.parameters.items() if each.kind is inspect.Parameter.VAR_KEYWORD]
    for name in rest:
        given.update(given.pop(name, {}))
    tensors = {name: each for name, each in given.items() if isinstance(each, Tensor)}
    others = {name: None if name in tensors else each for name, each in given.items()}
    plain = all(each is None or isinstance(each, bool | int | float | str) or each == {} for each in others.values())
    if not torch.compiler.is_exporting() or not plain or not tensors:
        return forward(*args, **kwargs)
    sizes = tuple(tuple(_size(size) for size in each.shape) for each in tensors.values())
    fixed = tuple(tuple(size if isinstance(size, int) else None for size in each) for each in sizes)
    number = blocks.find(
        repr((key, others, tuple(tensors), fixed)),
        lambda: Kind(block=block, arguments=others, tensors=tuple(tensors), sizes=sizes),
    )
    first = next(iter(tensors.values()))
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{_OPERATOR}",
        tuple(tensors.values()),
        {"kind": number, "path": path},
        dtype=first.dtype,
        shape=_SHAPES[type(block)](block, first),
        version=1,
    )


def _size(size: Any) -> int | str:
    return size if isinstance(size, int) else str(size)


class BlockCalls(nn.Module):
    """One block of each kind as a module of their tensors alone, in evaluation mode.

    Attributes:
        examples: tensors of the shapes of all kinds' inputs, one kind after the other. Free axes have distinct sizes in
            a kind, equal ones where the network's are.
        axes: for each input the name of each free axis.
    """

    def __init__(self, kinds: Sequence[Kind]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([kind.block for kind in kinds])
        self._kinds = kinds
        self.examples: tuple[Tensor, ...] = ()
        self.axes: tuple[dict[int, str], ...] = ()
        for index, kind in enumerate(kinds):
            free = dict.fromkeys(size for each in kind.sizes for size in each if isinstance(size, str))
            names = {size: f"axis{index}_{number}" for number, size in enumerate(free)}
            sizes = {size: 5 + 2 * number for number, size in enumerate(free)}
            for each in kind.sizes:
                self.examples += (torch.zeros([size if isinstance(size, int) else sizes[size] for size in each]),)
            self.axes += tuple(
                {axis: names[size] for axis, size in enumerate(each) if isinstance(size, str)} for each in kind.sizes
            )
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        return tuple(
            block(**{**kind.arguments, **{name: next(rest) for name in kind.tensors}})
            for block, kind in zip(self.blocks, self._kinds, strict=True)
        )


def separate_blocks(model: ir.Model, kinds: Sequence[Kind]) -> list[ir.Model]:
    """Return the graph of each kind, of the graph of all (`BlockCalls`), which is not modified."""
    separated, first = [], 0
    for index, kind in enumerate(kinds):
        own = model.clone()
        graph = own.graph
        keep = graph.inputs[first : first + len(kind.tensors)]
        first += len(kind.tensors)
        output = graph.outputs[index]
        graph.outputs.clear()
        graph.outputs.append(output)
        RemoveUnusedNodesPass()(own)
        graph.inputs.clear()
        graph.inputs.extend(keep)
        separated.append(own)
    return separated


def insert_blocks(
    model: ir.Model, graphs: Sequence[ir.Model], canonical_name: Callable[[str], str], refer: Callable[[str], Any]
) -> None:
    """Replace each node that stands for a block by the nodes of its kind.

    Args:
        model: the network's graph, whose nodes are named; modified.
        graphs: the graph of each kind (`separate_blocks`), with named nodes, and weights named as in `BlockCalls`.
        canonical_name: returns a weight's canonical name for its name in the network.
        refer: returns the tensor of a weight, by its name in the network.
    """
    axes = {
        size.value: (value, axis)
        for value in reversed(model.graph.inputs)
        for axis, size in enumerate(value.shape or ())
        if isinstance(size, ir.SymbolicDim) and size.value is not None
    }
    for node in tuple(model.graph):
        if node.domain == _DOMAIN:
            kind, path = node.attributes["kind"].as_int(), node.attributes["path"].as_string()
            _Insertion(model.graph, graphs[kind], kind, path, canonical_name, refer, axes).replace(node)
    model.graph.opset_imports.pop(_DOMAIN, None)


@dataclass
class _Insertion:
    """The insertion of a kind's nodes for one block."""

    graph: ir.Graph
    template: ir.Model
    kind: int
    path: str
    canonical_name: Callable[[str], str]
    refer: Callable[[str], Any]
    axes: Mapping[str, tuple[ir.Value, int]]

    def replace(self, node: ir.Node) -> None:
        self.scope = self.path.removeprefix("model.")
        self.known: dict[ir.Value, ir.Value] = {}
        self.sizes: dict[str, str] = {}
        for inner, outer in zip(self.template.graph.inputs, node.inputs, strict=True):
            assert outer is not None, "a block's node has tensors alone"
            self.known[inner] = outer
            for inside, outside in zip(inner.shape or (), outer.shape or (), strict=True):
                if isinstance(inside, ir.SymbolicDim) and (known := _name_size(outside)):
                    self.sizes.setdefault(str(inside.value), known)
        for each in self.template.graph:
            self.graph.insert_before(node, self._copy(each))
        (output,) = self.template.graph.outputs
        ir.convenience.replace_all_uses_with(node.outputs[0], self.known[output], replace_graph_outputs=True)
        self.graph.remove(node, safe=True)

    def _copy(self, node: ir.Node) -> ir.Node:
        outputs = [
            ir.Value(
                name=self._rename(str(node.name if value.is_graph_output() else value.name)),
                type=value.type,
                shape=self._translate(value.shape),
            )
            for value in node.outputs
        ]
        inputs = [None if value is None else self._find(value) for value in node.inputs]
        attributes: Any = node.attributes.values()
        owner = self._find_owner(node)
        if owner is not None:  # the size of an axis that an input of the network has
            value, axis = owner
            inputs = [value]
            attributes = [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)]
        self.known.update(zip(node.outputs, outputs, strict=True))
        return ir.Node(
            node.domain, node.op_type, inputs, attributes, outputs=outputs, name=self._rename(str(node.name))
        )

    def _find(self, value: ir.Value) -> ir.Value:
        if value not in self.known:
            assert value.is_initializer(), "nodes are in order"
            self.known[value] = self._find_initializer(value)
        return self.known[value]

    def _find_initializer(self, value: ir.Value) -> ir.Value:
        """Return the weight of this block, or the constant that all blocks of the kind share."""
        name = str(value.name)
        prefix = f"blocks.{self.kind}."
        if name.startswith(prefix):
            own = f"{self.path}.{name.removeprefix(prefix)}"
            name, tensor = self.canonical_name(own), self.refer(own)
        else:
            name, tensor = f"block{self.kind}/{name}", value.const_value
        if name not in self.graph.initializers:
            self.graph.initializers[name] = ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
        return self.graph.initializers[name]

    def _rename(self, name: str) -> str:
        """Return the name of a node or value of the kind's graph in the network's."""
        return f"{self.scope}{name.removeprefix(f'blocks.{self.kind}')}"

    def _find_owner(self, node: ir.Node) -> tuple[ir.Value, int] | None:
        """Return the input of the network that has the axis whose size a Shape node reads, if there is one."""
        source = node.inputs[0] if node.op_type == "Shape" else None
        if source is None or source not in self.template.graph.inputs or source.shape is None:
            return None
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(source.shape))
        if end != start + 1:
            return None
        return self.axes.get(self.sizes.get(_name_size(source.shape[start]), ""))

    def _translate(self, shape: ir.Shape | None) -> ir.Shape | None:
        """Return a shape whose free axes are named as in the network; an axis without a name there has none."""
        if shape is None:
            return None
        return ir.Shape([size if isinstance(size, int) else self._translate_size(_name_size(size)) for size in shape])

    def _translate_size(self, size: str) -> str | None:
        names = re.findall(r"[A-Za-z_]\w*", size)
        if not names or not {*names} <= self.sizes.keys():
            return None
        if names == [size]:
            return self.sizes[size]
        return re.sub(r"[A-Za-z_]\w*", lambda match: _enclose(self.sizes[match[0]]), size)


def _name_size(size: int | ir.SymbolicDim) -> str:
    """Return the text of an axis's size; empty for one without a name."""
    return str(size) if isinstance(size, int) else size.value or ""


def _enclose(size: str) -> str:
    return size if size.isidentifier() or size.isdigit() else f"({size})"

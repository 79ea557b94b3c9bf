"""How is a graph cut into parts?

What depends on one input alone can be computed apart, once for as long as that input stays the same. A part is the
graph less everything that its outputs do not need, over the same weights: constants, casts of weights and sizes are
made again wherever they are needed, and only finished values are handed over, as float32. A half value loses nothing by
that, on its way there or back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import ExportError

__all__ = ["cut", "handed_over"]

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
# They compute nothing, so what they are made of is handed over instead, and they are made again.
_MADE_AGAIN = {"Cast", "Unsqueeze"}


@dataclass(frozen=True)
class _Reach:
    """What a value depends on: the contents of inputs, and the sizes of named axes whichever input has them."""

    inputs: frozenset[str]
    axes: frozenset[str]


def handed_over(model: ir.Model, name: str) -> list[ir.Value]:
    """The values that depend on an input alone and that the rest of the graph needs, in the order it needs them.

    The size of a named axis is no dependence on the input it is read from: other inputs have that axis as well.

    Raises:
        ExportError: the rest of the graph needs the input itself.
    """
    source = next(value for value in model.graph.inputs if value.name == name)
    own = set(_axes(source))
    inside = {
        value
        for value, reach in _reaches(model).items()
        if reach.inputs == {name} and reach.axes <= own and not value.is_graph_output()
    }
    found: dict[ir.Value, None] = {}
    for node in model.graph:
        if inside.isdisjoint(node.outputs) and _size_read(node) is None:
            for value in node.inputs:
                if value in inside:
                    found.update(dict.fromkeys(_finished(value, inside, node)))
    return list(found)


def cut(
    model: ir.Model, *, inputs: Iterable[str], takes: Mapping[str, TensorSpec], gives: Mapping[str, str]
) -> ir.Model:
    """The part of a graph that makes some of its values from others.

    Args:
        model: the whole; left as it was. The part shares its tensors.
        inputs: which of the whole's inputs the part has.
        takes: values that the part is given, by name, and what it calls them. What it does not need is left out.
        gives: the part's outputs: values of the whole, by name, and what the part calls them; float32, unless they are
            no floats.

    Raises:
        ExportError: the outputs depend on something that is neither in `inputs` nor in `takes`.
    """
    part = model.clone()
    graph, values = part.graph, _by_name(part)
    given = [_take(graph, values[name], spec) for name, spec in takes.items()]
    outputs = [_give(graph, values[name], called) for name, called in gives.items()]
    del graph.outputs[:]
    graph.outputs.extend(outputs)
    kept = [value for value in graph.inputs if value.name in set(inputs)] + given
    _read_sizes_of(kept, graph)
    RemoveUnusedNodesPass()(part)
    left = [value.name for value in graph.inputs if value not in kept and value.uses()]
    if left:
        raise ExportError(f"{', '.join(gives.values())} cannot be made without {', '.join(map(str, left))}")
    del graph.inputs[:]
    graph.inputs.extend(value for value in kept if value.uses())
    return part


def _reaches(model: ir.Model) -> dict[ir.Value, _Reach]:
    nothing = _Reach(frozenset(), frozenset())
    reaches = {value: _Reach(frozenset({str(value.name)}), frozenset()) for value in model.graph.inputs}
    for node in model.graph:
        size = _size_read(node)
        if size is not None:
            reach = _Reach(frozenset(), frozenset({size}))
        else:
            sources = [reaches.get(value, nothing) for value in node.inputs if value is not None]
            inputs = frozenset[str]().union(*(source.inputs for source in sources))
            reach = _Reach(inputs, frozenset[str]().union(*(source.axes for source in sources)))
        reaches.update(dict.fromkeys(node.outputs, reach))
    return reaches


def _size_read(node: ir.Node) -> str | None:
    """The named axis of a graph's input whose size a node reads, if it does nothing else."""
    source = node.inputs[0] if node.op_type == "Shape" else None
    if source is None or not source.is_graph_input() or source.shape is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(source.shape))
    size = source.shape[start] if start in range(len(source.shape)) and end == start + 1 else None
    return size.value if isinstance(size, ir.SymbolicDim) else None


def _axes(value: ir.Value) -> dict[str, int]:
    """A value's named axes and where they are."""
    sizes = value.shape or ()
    return {size.value: axis for axis, size in enumerate(sizes) if isinstance(size, ir.SymbolicDim) and size.value}


def _finished(value: ir.Value, inside: set[ir.Value], user: ir.Node) -> list[ir.Value]:
    """What has to be handed over for `user` to have a value: itself, or what it is made of."""
    node = value.producer()
    if node is None:
        raise ExportError(f"{user.name} needs {value.name} itself, so the graph cannot be cut there")
    if value.dtype in _FLOATS and node.op_type not in _MADE_AGAIN:
        return [value]
    return [one for source in node.inputs if source in inside for one in _finished(source, inside, node)]


def _by_name(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for node in model.graph for value in node.outputs}


def _take(graph: ir.Graph, value: ir.Value, spec: TensorSpec) -> ir.Value:
    given = ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(spec.shape))
    used = given
    if value.dtype not in (None, ir.DataType.FLOAT):
        cast = _cast(given, value.dtype, f"{spec.name}/Cast")
        graph.insert_before(graph[0], cast)
        used = cast.outputs[0]
    ir.convenience.replace_all_uses_with(value, used)
    return given


def _give(graph: ir.Graph, value: ir.Value, called: str) -> ir.Value:
    if value.dtype not in _FLOATS - {ir.DataType.FLOAT}:
        value.name = called
        return value
    cast = _cast(value, ir.DataType.FLOAT, f"{called}/Cast")
    cast.outputs[0].name = called
    graph.append(cast)
    return cast.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, ir.TensorType(dtype), value.shape
    return cast


def _read_sizes_of(inputs: Iterable[ir.Value], graph: ir.Graph) -> None:
    """Have every size of a named axis read from one of these inputs that has it."""
    owners = {axis: (value, index) for value in reversed([*inputs]) for axis, index in _axes(value).items()}
    for node in graph:
        owner, axis = owners.get(_size_read(node) or "", (None, 0))
        if owner is not None:
            node.replace_input_with(0, owner)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)

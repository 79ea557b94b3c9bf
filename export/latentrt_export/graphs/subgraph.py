"""Extracts a subgraph that computes some values of a graph from others, over the same weights.

A subgraph is the graph without the nodes that its outputs do not need. Constants, casts of weights and sizes are
computed again wherever they are needed; only computed floating values cross a boundary, as float32. The round trip of
half values is exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import ExportError

__all__ = ["boundary_values", "extract_subgraph"]

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
# Operators that compute nothing: their source crosses the boundary instead, and they are repeated behind it.
_REPEATED = {"Cast", "Unsqueeze"}


@dataclass(frozen=True)
class _Dependencies:
    """The inputs whose contents a value depends on, and the named axes whose sizes it depends on."""

    inputs: frozenset[str]
    axes: frozenset[str]


def boundary_values(model: ir.Model, names: Collection[str]) -> list[ir.Value]:
    """Return the values that depend on these inputs alone and that other nodes read, in the order of those nodes.

    Reading the size of a named axis from an input does not count as a dependence on that input: other inputs have the
    axis as well.

    Args:
        model: the whole graph; not modified.
        names: the names of the inputs.

    Raises:
        ExportError: other nodes read an input itself.
    """
    sources = [value for value in model.graph.inputs if value.name in names]
    own = {axis for source in sources for axis in _find_axes(source)}
    inside = {
        value
        for value, found in _find_dependencies(model).items()
        if found.inputs and found.inputs <= {*names} and found.axes <= own and not value.is_graph_output()
    }
    boundary: dict[ir.Value, None] = {}
    for node in model.graph:
        if inside.isdisjoint(node.outputs) and _read_axis(node) is None:
            for value in node.inputs:
                if value in inside:
                    boundary.update(dict.fromkeys(_find_computed_sources(value, inside, node)))
    return list(boundary)


def extract_subgraph(
    model: ir.Model, *, keep_inputs: Iterable[str], inputs: Mapping[str, TensorSpec], outputs: Mapping[str, str]
) -> ir.Model:
    """Extract the nodes that compute some values of a graph from others.

    Args:
        model: the whole graph; not modified. The subgraph shares its tensors.
        keep_inputs: names of the whole's inputs that the subgraph has as well.
        inputs: value of the whole → the float32 input that replaces it. Inputs that turn out unused are dropped.
        outputs: value of the whole → its name as an output. Floating outputs are float32.

    Raises:
        ExportError: the outputs depend on an input that is neither in `keep_inputs` nor replaced by `inputs`.
    """
    part = model.clone()
    graph, values = part.graph, _map_by_name(part)
    added = [_add_input(graph, values[name], spec) for name, spec in inputs.items()]
    results = [_add_output(graph, values[name], renamed) for name, renamed in outputs.items()]
    del graph.outputs[:]
    graph.outputs.extend(results)
    kept = [value for value in graph.inputs if value.name in set(keep_inputs)] + added
    _read_sizes_from(kept, graph)
    RemoveUnusedNodesPass()(part)
    missing = [str(value.name) for value in graph.inputs if value not in kept and value.uses()]
    if missing:
        raise ExportError(f"{', '.join(outputs.values())} depends on {', '.join(missing)}, which the subgraph lacks")
    del graph.inputs[:]
    graph.inputs.extend(value for value in kept if value.uses())
    return part


def _find_dependencies(model: ir.Model) -> dict[ir.Value, _Dependencies]:
    nothing = _Dependencies(frozenset(), frozenset())
    known = {value: _Dependencies(frozenset({str(value.name)}), frozenset()) for value in model.graph.inputs}
    for node in model.graph:
        axis = _read_axis(node)
        if axis is not None:
            found = _Dependencies(frozenset(), frozenset({axis}))
        else:
            sources = [known.get(value, nothing) for value in node.inputs if value is not None]
            inputs = frozenset[str]().union(*(source.inputs for source in sources))
            found = _Dependencies(inputs, frozenset[str]().union(*(source.axes for source in sources)))
        known.update(dict.fromkeys(node.outputs, found))
    return known


def _read_axis(node: ir.Node) -> str | None:
    """Return the named axis of a graph input whose size a Shape node reads; None for every other node."""
    source = node.inputs[0] if node.op_type == "Shape" else None
    if source is None or not source.is_graph_input() or source.shape is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(source.shape))
    size = source.shape[start] if start in range(len(source.shape)) and end == start + 1 else None
    return size.value if isinstance(size, ir.SymbolicDim) else None


def _find_axes(value: ir.Value) -> dict[str, int]:
    """Return the positions of a value's named axes."""
    sizes = value.shape or ()
    return {size.value: axis for axis, size in enumerate(sizes) if isinstance(size, ir.SymbolicDim) and size.value}


def _find_computed_sources(value: ir.Value, inside: set[ir.Value], user: ir.Node) -> list[ir.Value]:
    """Return the computed floating values that determine `value`: itself, or the sources of a repeated node.

    Raises:
        ExportError: a node reads a graph input directly.
    """
    node = value.producer()
    if node is None:
        raise ExportError(f"{user.name} reads the input {value.name} itself, so the graph cannot be split there")
    if value.dtype in _FLOATS and node.op_type not in _REPEATED:
        return [value]
    return [
        found for source in node.inputs if source in inside for found in _find_computed_sources(source, inside, node)
    ]


def _map_by_name(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for node in model.graph for value in node.outputs}


def _add_input(graph: ir.Graph, value: ir.Value, spec: TensorSpec) -> ir.Value:
    added = ir.Value(name=spec.name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(spec.shape))
    replacement = added
    if value.dtype not in (None, ir.DataType.FLOAT):
        cast = _cast(added, value.dtype, f"{spec.name}/Cast")
        graph.insert_before(graph[0], cast)
        replacement = cast.outputs[0]
    ir.convenience.replace_all_uses_with(value, replacement)
    return added


def _add_output(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    if value.dtype not in _FLOATS - {ir.DataType.FLOAT}:
        value.name = name
        return value
    cast = _cast(value, ir.DataType.FLOAT, f"{name}/Cast")
    cast.outputs[0].name = name
    graph.append(cast)
    return cast.outputs[0]


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = name, ir.TensorType(dtype), value.shape
    return cast


def _read_sizes_from(inputs: Iterable[ir.Value], graph: ir.Graph) -> None:
    """Make every node that reads the size of a named axis read it from one of these inputs."""
    owners = {axis: (value, index) for value in reversed([*inputs]) for axis, index in _find_axes(value).items()}
    for node in graph:
        owner, axis = owners.get(_read_axis(node) or "", (None, 0))
        if owner is not None:
            node.replace_input_with(0, owner)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)

"""Evaluates a graph of any size in segments, so that the memory of its weights is bounded.

The nodes, in their order, are cut into segments whose weights do not exceed `SEGMENT_WEIGHTS`. A segment is opened,
runs on every set of inputs, and is closed before the next one is opened; the values that later segments read are kept
as arrays. The arithmetic is that of the whole graph, except that a backend cannot fuse nodes of two segments.

The segments depend on the graph alone, not on the machine, so that two exports give the same results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.modules.module import Arrays

__all__ = ["SEGMENT_WEIGHTS", "SegmentedGraph", "find_computed"]

SEGMENT_WEIGHTS = 96 << 20
"""The most elements of a segment's weights, unless one node has more: 0.4 GB as ONNX Runtime computes them."""


class SegmentedGraph:
    """A graph that is evaluated in segments with ONNX Runtime.

    Args:
        model: the graph; not modified.
        folder: the folder of its weights; temporary files are written to it.
        optimize, file_order: as `Graph`.
    """

    def __init__(self, model: ir.Model, folder: Path, *, optimize: bool = True, file_order: bool = False) -> None:
        self._model, self._file = model, folder / "segment.onnx"
        self._options = {"optimize": optimize, "file_order": file_order}
        self._segments = list(_find_segments(model))
        self._outputs = [str(value.name) for value in model.graph.outputs]
        self._last_use = {name: index for index, each in enumerate(self._segments) for name in each.reads}
        self._last_use.update(dict.fromkeys(self._outputs, len(self._segments)))

    def __len__(self) -> int:
        """Return the number of segments."""
        return len(self._segments)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Evaluate the graph on one set of inputs; see `run_all`."""
        return self.run_all([feeds])[0]

    def run_all(self, feeds: Iterable[Mapping[str, NDArray[Any]]]) -> list[Arrays]:
        """Evaluate the graph on sets of inputs; return the outputs of each by name.

        Args:
            feeds: inputs by name. Those that the graph does not have are ignored.

        Raises:
            ExportError: ONNX Runtime rejects a segment.
        """
        inputs = {str(value.name) for value in self._model.graph.inputs}
        values: list[Arrays] = [{name: array for name, array in each.items() if name in inputs} for each in feeds]
        for index, segment in enumerate(self._segments if values else ()):
            self._run_segment(index, segment, values)
        return [{name: each[name] for name in self._outputs} for each in values]

    def _run_segment(self, index: int, segment: _Segment, values: Sequence[Arrays]) -> None:
        """Evaluate a segment on all sets of values; add its results to them and drop what no later segment reads."""
        made = [name for name in segment.makes if self._last_use.get(name, -1) > index]
        try:
            ir.save(_build(self._model, segment, values, made), self._file)
            graph = Graph(self._file, **self._options)
        finally:
            self._file.unlink(missing_ok=True)
        for each in values:
            each.update(graph.run({name: each[name] for name in segment.reads}))
            for name in [name for name in each if self._last_use.get(name, -1) <= index]:
                del each[name]


@dataclass
class _Segment:
    """Consecutive nodes of a graph, and the nodes before them whose values depend on weights and constants alone.

    Attributes:
        nodes: the nodes, in their order.
        reads: the names of the computed values and inputs that they read from outside.
        makes: the names of the values that they compute from inputs.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    reads: dict[str, None] = field(default_factory=dict)
    makes: dict[str, None] = field(default_factory=dict)


def find_computed(model: ir.Model) -> set[ir.Value]:
    """Return the inputs of a graph and the values that depend on them, not on weights and constants alone."""
    computed = set[ir.Value](model.graph.inputs)
    for node in model.graph:
        if any(value in computed for value in node.inputs if value is not None):
            computed.update(node.outputs)
    return computed


def _find_segments(model: ir.Model) -> Iterator[_Segment]:
    computed = set[ir.Value | None](model.graph.inputs)
    segment, weights, placed = _Segment(), set[ir.Value](), set[ir.Node]()
    for node in model.graph:
        if computed.isdisjoint(node.inputs) and not any(value.is_graph_output() for value in node.outputs):
            continue  # placed before the first node that reads it
        computed.update(node.outputs)
        needed = _list_static(node, computed)
        read = (value for each in (*needed, node) for value in each.inputs)
        own = {value for value in read if value is not None and value.is_initializer()}
        if segment.nodes and sum(map(_count, weights | own)) > SEGMENT_WEIGHTS:
            yield segment
            segment, weights, placed = _Segment(), set(), set()
        weights |= own
        for each in needed:
            if each not in placed:
                placed.add(each)
                segment.nodes.append(each)
        segment.nodes.append(node)
        segment.reads.update(
            (str(value.name), None)
            for value in node.inputs
            if value in computed and value is not None and str(value.name) not in segment.makes
        )
        segment.makes.update((str(value.name), None) for value in node.outputs)
    if segment.nodes:
        yield segment


def _list_static(node: ir.Node, computed: set[ir.Value | None]) -> list[ir.Node]:
    """Return the nodes that a node needs and that depend on weights and constants alone, in their order."""
    found: dict[ir.Node, None] = {}

    def visit(value: ir.Value | None) -> None:
        producer = None if value is None or value in computed else value.producer()
        if producer is not None and producer not in found:
            for source in producer.inputs:
                visit(source)
            found[producer] = None

    for value in node.inputs:
        visit(value)
    return list(found)


def _count(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.size


def _build(model: ir.Model, segment: _Segment, values: Sequence[Arrays], made: Sequence[str]) -> ir.Model:
    """Return a segment as a graph of its own, whose inputs have the types of these sets of arrays."""
    inputs = {name: _make_input(name, [np.asarray(each[name]) for each in values]) for name in segment.reads}
    known: dict[str, ir.Value] = dict(inputs)
    initializers: dict[str, ir.Value] = {}

    def find(value: ir.Value | None) -> ir.Value | None:
        if value is None:
            return None
        name = str(value.name)
        if name not in known:
            assert value.is_initializer(), "computed values come from the segment's own nodes or its inputs"
            known[name] = initializers[name] = ir.Value(
                name=name, type=value.type, shape=value.shape, const_value=value.const_value
            )
        return known[name]

    nodes = []
    for node in segment.nodes:
        outputs = [ir.Value(name=value.name, type=value.type) for value in node.outputs]
        nodes.append(
            ir.Node(
                node.domain,
                node.op_type,
                [find(value) for value in node.inputs],
                node.attributes.values(),
                outputs=outputs,
                name=node.name,
            )
        )
        known.update((str(value.name), value) for value in outputs)
    graph = ir.Graph(
        list(inputs.values()),
        [known[name] for name in made],
        nodes=nodes,
        initializers=list(initializers.values()),
        opset_imports=model.graph.opset_imports,
        name="segment",
    )
    return ir.Model(graph, ir_version=model.ir_version)


def _make_input(name: str, arrays: Sequence[NDArray[Any]]) -> ir.Value:
    """Return an input for arrays of one type; the axes that all of them have at one size have that size."""
    sizes = zip(*(array.shape for array in arrays), strict=True)
    shape = ir.Shape([axis[0] if len({*axis}) == 1 else None for axis in sizes])
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(arrays[0].dtype)), shape=shape)

"""The ranges of whole numbers in an ONNX graph: no index may lie outside its data, and no divisor may be 0.

Backends differ in what they do there: ONNX Runtime fails, OpenVINO reads or writes out of bounds, and a division of
whole numbers by 0 ends the process (SIGFPE). So a graph runs only if it is certain from the graph that neither happens:
indices are constants, come from an input whose range the manifest states, or are computed from those (interval
arithmetic). Indices below 0, which ONNX allows and the exporter never writes, are refused too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from latentrt.bundle.graph_shapes import Shape, Values, read_values
from latentrt.bundle.onnx_graph import GraphFormatError, Node, OnnxGraph
from latentrt.bundle.onnx_types import CODES, WHOLE_CODES
from latentrt.bundle.tensors import MAX_AXES

__all__ = ["Range", "check_ranges"]

Range = tuple[int, int]
"""The least and the greatest value of a tensor of whole numbers."""
# By TensorProto.DataType. A result beyond its type would wrap around. OpenVINO computes int64 as int32 on a CPU.
_LIMITS: Mapping[int, Range] = {
    CODES["uint8"]: (0, 255),
    CODES["int8"]: (-128, 127),
    CODES["int32"]: (-(1 << 31), (1 << 31) - 1),
    CODES["int64"]: (-(1 << 31), (1 << 31) - 1),
    CODES["bool"]: (0, 1),
}


def check_ranges(
    graph: OnnxGraph,
    types: Mapping[str, int],
    shapes: Mapping[str, Shape],
    values: Mapping[str, Values],
    inputs: Mapping[str, Range],
) -> None:
    """Check every index and every divisor of a graph.

    Args:
        graph: its nodes in an order in which they can run.
        types: of its tensors (`latentrt.bundle.graph_types.infer_types`).
        shapes, values: of its tensors (`latentrt.bundle.graph_shapes.infer_values`).
        inputs: the range of each input that has one.

    Raises:
        GraphFormatError: an index may lie outside its data, or a whole number may be divided by one that is not above
            0.
    """
    ranges = _Ranges(graph, types, shapes, values, inputs)
    for node in graph.nodes:
        ranges.add(node)


class _Ranges:
    """Ranges of the tensors so far. Whole numbers without a range may be any of their type."""

    def __init__(
        self,
        graph: OnnxGraph,
        types: Mapping[str, int],
        shapes: Mapping[str, Shape],
        values: Mapping[str, Values],
        inputs: Mapping[str, Range],
    ) -> None:
        self._types, self._shapes, self._values = types, shapes, values
        self._ranges: dict[str, Range] = {**inputs}
        # The ranges of the columns of the last axis, where they differ: indices of several axes.
        self._columns: dict[str, tuple[Range | None, ...]] = {}
        for name, tensor in graph.initializers.items():
            if tensor.dtype in _LIMITS and (array := read_values(tensor)) is not None and array.size:
                self._ranges[name] = _value_range(array)
                if array.ndim > 1 and array.shape[-1] <= MAX_AXES:
                    self._columns[name] = tuple(_value_range(array[..., column]) for column in range(array.shape[-1]))

    def add(self, node: Node) -> None:
        """Check a node, and record the ranges of its outputs."""
        if check := _CHECKS.get(node.op_type):
            try:
                check(self, node)
            except ValueError as error:
                raise GraphFormatError(f"has node '{node.name}', whose {node.op_type} {error}") from None
        for index, name in enumerate(node.outputs):
            if (found := self._infer_range(node, index, name)) is not None:
                self._ranges[name] = found
        if node.op_type == "Concat" and self._joins_columns(node):
            self._columns[node.outputs[0]] = tuple(column for name in node.inputs for column in self.columns(name))

    def range_of(self, name: str) -> Range | None:
        """Return the range of a tensor; None: not whole numbers, or any of their type."""
        found = self._ranges.get(name)
        return found if found is not None else _NARROW.get(self._types[name])

    def columns(self, name: str) -> tuple[Range | None, ...]:
        """Return the range of each column of the last axis of a tensor."""
        return self._columns.get(name) or (self.range_of(name),) * self._shapes[name][-1]

    def shape(self, name: str) -> Shape:
        """Return the shape of a tensor."""
        return self._shapes[name]

    def is_whole(self, name: str) -> bool:
        """Return whether a tensor holds whole numbers."""
        return self._types[name] in (*WHOLE_CODES, CODES["bool"])

    def _joins_columns(self, node: Node) -> bool:
        """Return whether a Concat joins the columns of indices."""
        shape = self._shapes[node.outputs[0]]
        return _integer(node, "axis", 0) % len(shape) == len(shape) - 1 and shape[-1] <= MAX_AXES

    def _infer_range(self, node: Node, output: int, name: str) -> Range | None:
        if (known := self._values.get(name)) is not None and known.size and known.dtype.kind in "iub":
            return _value_range(known)
        limits, shape = _LIMITS.get(self._types[name]), self._shapes
        if limits is None:
            return None
        if node.op_type == "TopK" and output == 1:
            return 0, shape[node.inputs[0]][_integer(node, "axis", -1)] - 1
        if node.op_type == "ArgMax":
            return 0, shape[node.inputs[0]][_integer(node, "axis", 0)] - 1
        if node.op_type == "Range":
            return self._range_of_range(node)
        if node.op_type == "Clip":
            found = self._range_of_clip(node)
            return found if found is not None and _is_within(found, limits) else None
        rule = _RULES.get(node.op_type)
        if rule is None:
            return None
        indices, combine = rule
        taken = [
            self.range_of(each)
            for index, each in enumerate(node.inputs)
            if each and (indices is None or index in indices)
        ]
        known_ranges = [each for each in taken if each is not None and _is_within(each, limits)]
        if not taken or len(known_ranges) != len(taken):
            return None
        found = combine(known_ranges)
        return found if found is not None and _is_within(found, limits) else None

    def _range_of_clip(self, node: Node) -> Range | None:
        """Return the range of min(max(x, least), most); x without a range may be any number of 64 bits."""
        name, least_name, most_name = (*node.inputs, "", "")[:3]
        low, high = self.range_of(name) or (-(1 << 63), (1 << 63) - 1)
        for bound_name, choose in ((least_name, max), (most_name, min)):
            if bound_name:
                bound = self.range_of(bound_name)
                if bound is None:
                    return None
                low, high = choose(low, bound[0]), choose(high, bound[1])
        return low, high

    def _range_of_range(self, node: Node) -> Range | None:
        start, _, delta = (self._values[name].item() for name in node.inputs)
        (count,) = self._shapes[node.outputs[0]]
        last = start + (count - 1) * delta
        return min(start, last), max(start, last)


_NARROW: Mapping[int, Range] = {dtype: limits for dtype, limits in _LIMITS.items() if limits[1] < 256}


def _is_within(found: Range, limits: Range) -> bool:
    return limits[0] <= found[0] <= found[1] <= limits[1]


def _value_range(array: Values) -> Range:
    return int(array.min()), int(array.max())


def _integer(node: Node, name: str, default: int) -> int:
    found = node.attributes.get(name, default)
    assert isinstance(found, int), "checked with its shape"
    return found


# --- Checks ----------------------------------------------------------------------------------------------------------


def _check_divisor(ranges: _Ranges, node: Node) -> None:
    """Check that whole numbers are divided by others above 0: neither by 0, nor the least one by −1."""
    if not ranges.is_whole(node.inputs[1]):
        return
    found = ranges.range_of(node.inputs[1])
    if found is None or found[0] < 1:
        raise ValueError(f"divides whole numbers by {_describe(found)}, expected numbers above 0")


def _check_index(found: Range | None, size: int) -> None:
    if found is None or not 0 <= found[0] <= found[1] < size:
        raise ValueError(f"takes {_describe(found)} as an index of an axis of {size}, expected 0 to {size - 1}")


def _describe(found: Range | None) -> str:
    return "numbers without a known range" if found is None else f"numbers from {found[0]} to {found[1]}"


def _check_along_axis(ranges: _Ranges, node: Node) -> None:
    _check_index(ranges.range_of(node.inputs[1]), ranges.shape(node.inputs[0])[_integer(node, "axis", 0)])


def _check_columns(ranges: _Ranges, node: Node) -> None:
    first = _integer(node, "batch_dims", 0) if node.op_type == "GatherND" else 0
    for size, column in zip(ranges.shape(node.inputs[0])[first:], ranges.columns(node.inputs[1]), strict=False):
        _check_index(column, size)


_CHECKS: Mapping[str, Callable[[_Ranges, Node], None]] = {
    "Div": _check_divisor,
    "Gather": _check_along_axis,
    "GatherElements": _check_along_axis,
    "GatherND": _check_columns,
    "ScatterElements": _check_along_axis,
    "ScatterND": _check_columns,
}


# --- Interval arithmetic ---------------------------------------------------------------------------------------------


def _union(taken: Sequence[Range]) -> Range:
    return min(low for low, _ in taken), max(high for _, high in taken)


def _multiply(taken: Sequence[Range]) -> Range:
    (a, b), (c, d) = taken
    products = (a * c, a * d, b * c, b * d)
    return min(products), max(products)


def _divide(taken: Sequence[Range]) -> Range | None:
    """Divide by numbers above 0, rounding towards 0."""
    (low, high), (least, most) = taken
    if least < 1:
        return None
    quotients = [each // by if each >= 0 else -(-each // by) for each in (low, high) for by in (least, most)]
    return min(quotients), max(quotients)


def _absolute(taken: Sequence[Range]) -> Range:
    ((low, high),) = taken
    return 0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high))


# Operators whose output has values of their first input alone.
_SELECTING = (
    *("Cast", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Reshape", "Slice", "Split", "Squeeze"),
    *("TopK", "Transpose", "Unsqueeze"),
)
_Rule = tuple[Sequence[int] | None, Callable[[Sequence[Range]], Range | None]]
# Operator → the inputs whose values its output has or is computed from (None: all), and the output's range.
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_SELECTING, ((0,), _union)),
    "Abs": ((0,), _absolute),
    "Add": (None, lambda taken: (taken[0][0] + taken[1][0], taken[0][1] + taken[1][1])),
    "Concat": (None, _union),
    "Div": (None, _divide),
    "Max": (None, lambda taken: (max(low for low, _ in taken), max(high for _, high in taken))),
    "Min": (None, lambda taken: (min(low for low, _ in taken), min(high for _, high in taken))),
    "Mul": (None, _multiply),
    "Neg": ((0,), lambda taken: (-taken[0][1], -taken[0][0])),
    "ScatterElements": ((0, 2), _union),
    "ScatterND": ((0, 2), _union),
    "Sub": (None, lambda taken: (taken[0][0] - taken[1][1], taken[0][1] - taken[1][0])),
    "Where": ((1, 2), _union),
}

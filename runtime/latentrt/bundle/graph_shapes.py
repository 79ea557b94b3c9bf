"""The shapes of all tensors of an ONNX graph for inputs of given sizes, and the memory that they need together.

Nothing is computed but sizes: a graph of a few bytes can ask for terabytes, and a backend that folds constants would
allocate them while it loads the graph. There is a rule for each operator that the exporter writes. Small tensors that
hold sizes (the outputs of `Shape`, and values calculated from them) are evaluated.

Semantics: the ONNX operators of opset 21, and `MultiHeadAttention` of ONNX Runtime's `com.microsoft`. The attributes of
nodes are of the types, and have the values, that `latentrt.bundle.graph_attributes` allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.onnx_graph import GraphFormatError, Node, OnnxGraph, Tensor
from latentrt.bundle.onnx_types import ELEMENT_TYPES, ElementType

__all__ = ["OPERATORS", "Shape", "Values", "infer_values", "peak_bytes", "read_values"]

Shape = tuple[int, ...]
Values = NDArray[Any]

# Larger tensors are no sizes.
_MAX_VALUES = 256
# An element counts as float32 at least, in which a backend may compute in place of a narrower type.
_LEAST_BYTES = 4


class _Inputs:
    """The inputs of one node. Every method raises ValueError if the node lacks the value that it returns.

    Attributes:
        shapes: the shape of each input; None where an optional one is left out.
        values: the values of each input that holds sizes; else None.
    """

    __slots__ = ("node", "shapes", "values")

    def __init__(self, node: Node, shapes: list[Shape | None], values: list[Values | None]) -> None:
        self.node, self.shapes, self.values = node, shapes, values

    def shape(self, index: int) -> Shape:
        """Return the shape of an input."""
        found = self.shapes[index] if index < len(self.shapes) else None
        if found is None:
            raise ValueError(f"has no input {index}")
        return found

    def check_shape(self, index: int, *expected: Shape) -> None:
        """Check that an input, unless it is left out, has one of these shapes."""
        found = self.shapes[index] if index < len(self.shapes) else None
        if found is not None and found not in expected:
            raise ValueError(f"has input {index} of shape {list(found)}, expected {list(expected[0])}")

    def sizes(self, index: int) -> list[Any] | None:
        """Return the values of an input that holds sizes, as numbers; None where it is left out.

        Raises:
            ValueError: its values depend on the contents of other tensors.
        """
        if index >= len(self.shapes) or self.shapes[index] is None:
            return None
        found = self.values[index]
        if found is None:
            raise ValueError("has a size that depends on the contents of a tensor")
        numbers: list[Any] = found.reshape(-1).tolist()
        return numbers

    def number(self, index: int) -> Any:
        """Return the one value of an input."""
        found = self.sizes(index)
        if found is None or len(found) != 1:
            raise ValueError(f"takes {found} as input {index}, expected one number")
        return found[0]

    def integer(self, name: str, default: int | None = None) -> int:
        """Return an attribute of the node that is a whole number. Without a default, the node must have it."""
        found = self.node.attributes.get(name, default)
        if not isinstance(found, int):
            raise ValueError(f"has {name} = {found!r}, expected a whole number")
        return found

    def integers(self, name: str) -> tuple[int, ...] | None:
        """Return an attribute of the node that is a list of whole numbers; None where it is left out."""
        found = self.node.attributes.get(name)
        if found is not None and not isinstance(found, tuple):
            raise ValueError(f"has {name} = {found!r}, expected whole numbers")
        return found


def read_values(tensor: Tensor) -> Values | None:
    """Return the values of a constant; None where they are in the weights file."""
    if tensor.raw is None:
        return None
    return np.frombuffer(tensor.raw, ELEMENT_TYPES[tensor.dtype].dtype).reshape(tensor.shape)


def infer_values(graph: OnnxGraph, sizes: Mapping[str, int]) -> tuple[dict[str, Shape], dict[str, Values]]:
    """Return the shape of every tensor, and the values of the small ones that hold sizes.

    Args:
        graph: its nodes in an order in which they can run.
        sizes: the size of each named axis of its inputs.

    Raises:
        GraphFormatError: a node does not fit its inputs, or a size depends on the contents of a tensor.
    """
    inference = _Inference(graph, sizes)
    return inference.shapes, inference.values


def peak_bytes(graph: OnnxGraph, types: Mapping[str, int], shapes: Mapping[str, Shape]) -> tuple[int, str]:
    """Return the most memory that inputs and computed tensors take at one time, and the node that takes it.

    A tensor is released after the last node that reads it. Those that depend on no input's contents are never released:
    a backend computes all of them while it loads the graph, before it drops any.
    """
    last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    kept = len(graph.nodes)
    last_use.update(dict.fromkeys((*graph.outputs, *_find_foldable(graph)), kept))
    place = "inputs"

    def size(name: str) -> int:
        return math.prod(shapes[name]) * max(ELEMENT_TYPES[types[name]].itemsize, _LEAST_BYTES)

    held = {name: size(name) for name in graph.inputs}
    live = peak = sum(held.values())
    for index, node in enumerate(graph.nodes):
        for name in node.outputs:
            if name:
                held[name] = size(name)
                live += held[name]
        if live > peak:
            peak, place = live, node.name
        for name in (*node.inputs, *node.outputs):
            if name in held and last_use.get(name, -1) <= index:
                live -= held.pop(name)
    return peak, place


def _find_foldable(graph: OnnxGraph) -> set[str]:
    """Return the computed tensors that depend on constants and shapes alone."""
    found = set[str]()
    for node in graph.nodes:
        if node.op_type == "Shape" or all(
            not name or name in found or name in graph.initializers for name in node.inputs
        ):
            found.update(node.outputs)
    return found


class _Inference:
    def __init__(self, graph: OnnxGraph, sizes: Mapping[str, int]) -> None:
        self.shapes: dict[str, Shape] = {"": ()}
        self.values: dict[str, Values] = {}
        for name, tensor in graph.initializers.items():
            self.shapes[name] = tensor.shape
            if math.prod(tensor.shape) <= _MAX_VALUES and (values := read_values(tensor)) is not None:
                self.values[name] = values
        for name, spec in graph.inputs.items():
            self.shapes[name] = tuple(_size(axis, sizes) for axis in spec.shape or ())
        with np.errstate(all="ignore"):
            for node in graph.nodes:
                self._add(node)
        del self.shapes[""]

    def _add(self, node: Node) -> None:
        try:
            inputs = _Inputs(
                node,
                [self.shapes[name] if name else None for name in node.inputs],
                [self.values.get(name) for name in node.inputs],
            )
            if len(node.inputs) != _COUNTS.get(node.op_type, len(node.inputs)):
                raise ValueError(f"has {len(node.inputs)} inputs, expected {_COUNTS[node.op_type]}")
            made = self._evaluate(inputs)
            shapes = [made.shape] if made is not None else _RULES[node.domain, node.op_type](inputs)
            if len(shapes) != len(node.outputs):
                raise ValueError(f"has {len(node.outputs)} outputs, expected {len(shapes)}")
        except (ValueError, IndexError, OverflowError, ZeroDivisionError, TypeError) as error:
            known = [None if name not in self.shapes else list(self.shapes[name]) for name in node.inputs]
            raise GraphFormatError(
                f"has node '{node.name}', whose {node.op_type} does not fit its inputs {known}: {error}"
            ) from None
        for name, shape in zip(node.outputs, shapes, strict=True):
            if any(size < 0 for size in shape):
                raise GraphFormatError(f"has node '{node.name}', whose output would have the shape {list(shape)}")
            self.shapes[name] = shape
        if made is not None and made.size <= _MAX_VALUES:
            self.values[node.outputs[0]] = made

    def _evaluate(self, inputs: _Inputs) -> Values | None:
        """Return the output of a node that calculates with sizes; None for any other node."""
        node = inputs.node
        if node.op_type == "Shape":
            shape = inputs.shape(0)
            return np.array(shape[inputs.integer("start", 0) : inputs.integer("end", len(shape))], np.int64)
        evaluate = _EVALUATED.get(node.op_type)
        if evaluate is None or any(
            value is None and shape is not None for value, shape in zip(inputs.values, inputs.shapes, strict=True)
        ):
            return None
        return evaluate(inputs)


def _size(axis: int | str | None, sizes: Mapping[str, int]) -> int:
    if isinstance(axis, int):
        return axis
    factor, _, name = (axis or "").rpartition("*")
    if name not in sizes or not (factor == "" or factor.isdecimal()):
        raise GraphFormatError(f"has an input with the axis {axis!r}, expected one of {', '.join(sizes)}")
    return int(factor or 1) * sizes[name]


# --- Values ----------------------------------------------------------------------------------------------------------


def _array(inputs: _Inputs, index: int) -> Values:
    value = inputs.values[index]
    if value is None:
        raise ValueError(f"has no input {index}")
    return value


def _arithmetic(function: Callable[..., Any]) -> Callable[[_Inputs], Values]:
    """Evaluate with whole numbers of 32 bits: OpenVINO computes those of 64 bits as such on a CPU."""
    evaluate = _elementwise(function)

    def check(array: Values) -> None:
        if array.dtype.kind in "iu" and array.size and not -(1 << 31) <= array.min() <= array.max() < 1 << 31:
            raise ValueError("calculates with numbers of more than 32 bits")

    def evaluate_checked(inputs: _Inputs) -> Values:
        for index in range(len(inputs.values)):
            check(_array(inputs, index))
        made = evaluate(inputs)
        check(made)
        return made

    return evaluate_checked


def _elementwise(function: Callable[..., Any]) -> Callable[[_Inputs], Values]:
    def evaluate(inputs: _Inputs) -> Values:
        arrays = [_array(inputs, index) for index in range(len(inputs.values))]
        if math.prod(_broadcast([array.shape for array in arrays])) > _MAX_VALUES:
            raise ValueError("calculates too many sizes")
        return np.asarray(function(*arrays))

    return evaluate


def _divide(left: Values, right: Values) -> Values:
    """Divide; whole numbers are rounded towards zero."""
    if not np.issubdtype(left.dtype, np.integer):
        return np.asarray(left / right)
    if not right.all():
        raise ValueError("divides by zero")
    return np.asarray(np.sign(left) * np.sign(right) * (np.abs(left) // np.abs(right)), left.dtype)


def _cast(inputs: _Inputs) -> Values:
    """Cast sizes. Rejects a number that the target type cannot hold, which backends convert differently."""
    array, dtype = _array(inputs, 0), np.dtype(_target(inputs).dtype)
    if array.dtype.kind in "fiu" and dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not all(
            math.isfinite(each) and limits.min <= int(each) <= limits.max for each in array.reshape(-1).tolist()
        ):
            raise ValueError(f"casts a number that {dtype} does not have")
    return array.astype(dtype)


def _target(inputs: _Inputs) -> ElementType:
    """Return the type to which a node casts."""
    found = ELEMENT_TYPES.get(inputs.integer("to"))
    if found is None:
        raise ValueError(f"casts to data type {inputs.integer('to')}, expected one of {sorted(ELEMENT_TYPES)}")
    return found


def _evaluate_slice(inputs: _Inputs) -> Values:
    data = _array(inputs, 0)
    index: list[slice] = [slice(None)] * data.ndim
    for axis, start, end, step in _slices(inputs, data.shape):
        index[axis] = slice(start, end if end >= 0 else None, step)
    return data[tuple(index)]


_EVALUATED: Mapping[str, Callable[[_Inputs], Values]] = {
    "Abs": _arithmetic(np.abs),
    "Add": _arithmetic(np.add),
    "Cast": _cast,
    "Concat": lambda inputs: np.concatenate(
        [_array(inputs, index) for index in range(len(inputs.values))], axis=inputs.integer("axis")
    ),
    "Div": _arithmetic(_divide),
    "Equal": _elementwise(np.equal),
    "Floor": _elementwise(np.floor),
    "Gather": lambda inputs: np.asarray(
        np.take(_array(inputs, 0), _array(inputs, 1), axis=inputs.integer("axis", 0), mode="raise")
    ),
    "Greater": _elementwise(np.greater),
    "Identity": lambda inputs: _array(inputs, 0),
    "Less": _elementwise(np.less),
    "Max": _elementwise(lambda *arrays: np.max(np.broadcast_arrays(*arrays), axis=0)),
    "Min": _elementwise(lambda *arrays: np.min(np.broadcast_arrays(*arrays), axis=0)),
    "Mul": _arithmetic(np.multiply),
    "Neg": _arithmetic(np.negative),
    "Reshape": lambda inputs: _array(inputs, 0).reshape(_reshape(inputs)[0]),
    "Round": _elementwise(np.rint),
    "Slice": _evaluate_slice,
    "Sqrt": _elementwise(np.sqrt),
    "Squeeze": lambda inputs: _array(inputs, 0).reshape(_squeeze(inputs)[0]),
    "Sub": _arithmetic(np.subtract),
    "Unsqueeze": lambda inputs: _array(inputs, 0).reshape(_unsqueeze(inputs)[0]),
    "Where": _elementwise(np.where),
}


# --- Shapes ----------------------------------------------------------------------------------------------------------


def _same(inputs: _Inputs) -> list[Shape]:
    return [inputs.shape(0)]


def _cast_shape(inputs: _Inputs) -> list[Shape]:
    _target(inputs)
    return _same(inputs)


def _softmax(inputs: _Inputs) -> list[Shape]:
    data = inputs.shape(0)
    _axis(inputs.integer("axis", -1), len(data))
    return [data]


def _clip(inputs: _Inputs) -> list[Shape]:
    inputs.check_shape(1, ())
    inputs.check_shape(2, ())
    return _same(inputs)


def _batch_normalization(inputs: _Inputs) -> list[Shape]:
    data = inputs.shape(0)
    for index in range(1, 5):
        inputs.check_shape(index, (data[1],))
    return [data]


def _group_normalization(inputs: _Inputs) -> list[Shape]:
    data, groups = inputs.shape(0), inputs.integer("num_groups")
    if groups < 1 or data[1] % groups:
        raise ValueError(f"has {groups} groups, expected a divisor of the channels")
    inputs.check_shape(1, (data[1],))
    inputs.check_shape(2, (data[1],))
    return [data]


def _layer_normalization(inputs: _Inputs) -> list[Shape]:
    data = inputs.shape(0)
    normalized = data[_axis(inputs.integer("axis", -1), len(data)) :]
    inputs.check_shape(1, normalized)
    inputs.check_shape(2, normalized)
    return [data]


def _quantize(inputs: _Inputs) -> list[Shape]:
    """Check that there is one scale, or one for each element of the axis, and as many zero points."""
    data, scale = inputs.shape(0), inputs.shape(1)
    if scale:
        inputs.check_shape(1, (data[_axis(inputs.integer("axis", 1), len(data))],))
    inputs.check_shape(2, scale)
    return [data]


def _broadcast(shapes: list[Shape]) -> Shape:
    rank = max(map(len, shapes))
    result = [1] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                if result[axis] not in (1, size):
                    raise ValueError("their sizes cannot be broadcast")
                result[axis] = size
    return tuple(result)


def _broadcasting(inputs: _Inputs) -> list[Shape]:
    return [_broadcast([inputs.shape(index) for index in range(len(inputs.shapes))])]


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError(f"has no axis {axis}")
    return axis % rank


def _matmul(inputs: _Inputs) -> list[Shape]:
    left, right = inputs.shape(0), inputs.shape(1)
    if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
        raise ValueError("these are no matrices that can be multiplied")
    return [(*_broadcast([left[:-2], right[:-2]]), left[-2], right[-1])]


def _gemm(inputs: _Inputs) -> list[Shape]:
    (rows, inner), (inner2, columns) = (
        inputs.shape(index)[:: -1 if inputs.integer(name, 0) else 1] for index, name in enumerate(("transA", "transB"))
    )
    if inner != inner2:
        raise ValueError("these are no matrices that can be multiplied")
    inputs.check_shape(2, (columns,), (1,), (), (rows, columns), (1, columns), (rows, 1), (1, 1))
    return [(rows, columns)]


def _window(inputs: _Inputs, rank: int, kernel: Shape) -> tuple[Shape, Shape, Shape]:
    """Return strides, extents (of the dilated kernel) and pads (of both ends together) for each spatial axis."""
    ones = (1,) * rank
    strides, dilations = inputs.integers("strides") or ones, inputs.integers("dilations") or ones
    pads = inputs.integers("pads") or (0,) * (2 * rank)
    if not len(kernel) == len(strides) == len(dilations) == len(pads) // 2 == rank or min(*strides, *dilations) < 1:
        raise ValueError("its window has another number of axes")
    if min(pads) < 0:
        raise ValueError(f"has the pads {list(pads)}, expected none below 0")
    extents = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    return strides, extents, tuple(pads[axis] + pads[axis + rank] for axis in range(rank))


def _kernel(inputs: _Inputs, kernel: Shape) -> Shape:
    """Check that the kernel has the sizes of the weight."""
    named = inputs.integers("kernel_shape") or kernel
    if named != kernel:
        raise ValueError(f"has kernel_shape {list(named)}, expected {list(kernel)} as its weight has")
    return kernel


def _conv(inputs: _Inputs) -> list[Shape]:
    data, weight, group = inputs.shape(0), inputs.shape(1), inputs.integer("group", 1)
    if group < 1 or data[1] != weight[1] * group or weight[0] % group:
        raise ValueError(f"its channels do not fit its weight in {group} groups")
    inputs.check_shape(2, weight[:1])
    spatial = data[2:]
    strides, extents, pads = _window(inputs, len(spatial), _kernel(inputs, weight[2:]))
    return [(data[0], weight[0], *_slide(spatial, strides, extents, pads))]


def _slide(spatial: Shape, strides: Shape, extents: Shape, pads: Shape) -> Shape:
    axes = zip(spatial, strides, extents, pads, strict=True)
    return tuple((size + pad - extent) // stride + 1 for size, stride, extent, pad in axes)


def _conv_transpose(inputs: _Inputs) -> list[Shape]:
    data, weight, group = inputs.shape(0), inputs.shape(1), inputs.integer("group", 1)
    if group < 1 or data[1] != weight[0] or weight[0] % group:
        raise ValueError(f"its channels do not fit its weight in {group} groups")
    inputs.check_shape(2, (weight[1] * group,))
    spatial = data[2:]
    strides, extents, pads = _window(inputs, len(spatial), _kernel(inputs, weight[2:]))
    extra = inputs.integers("output_padding") or (0,) * len(spatial)
    axes = zip(spatial, strides, extents, pads, extra, strict=True)
    sizes = (stride * (size - 1) + more + extent - pad for size, stride, extent, pad, more in axes)
    return [(data[0], weight[1] * group, *sizes)]


def _max_pool(inputs: _Inputs) -> list[Shape]:
    data, kernel = inputs.shape(0), inputs.integers("kernel_shape") or ()
    return [(*data[:2], *_slide(data[2:], *_window(inputs, len(data) - 2, kernel)))]


def _reduce(inputs: _Inputs) -> list[Shape]:
    data, axes = inputs.shape(0), inputs.sizes(1)
    if not axes:
        if inputs.integer("noop_with_empty_axes", 0):
            return [data]
        axes = list(range(len(data)))
    reduced, keep = {_axis(axis, len(data)) for axis in axes}, inputs.integer("keepdims", 1)
    if inputs.node.op_type in ("ReduceMax", "ReduceMean") and any(data[axis] == 0 for axis in reduced):
        raise ValueError("reduces an axis without elements")
    return [tuple(1 if axis in reduced else size for axis, size in enumerate(data) if keep or axis not in reduced)]


def _arg_max(inputs: _Inputs) -> list[Shape]:
    data = inputs.shape(0)
    axis = _axis(inputs.integer("axis", 0), len(data))
    if data[axis] == 0:
        raise ValueError("has nothing to choose from")
    return [(*data[:axis], *((1,) if inputs.integer("keepdims", 1) else ()), *data[axis + 1 :])]


def _concat(inputs: _Inputs) -> list[Shape]:
    shapes = [inputs.shape(index) for index in range(len(inputs.shapes))]
    axis = _axis(inputs.integer("axis"), len(shapes[0]))
    if len({(*shape[:axis], -1, *shape[axis + 1 :]) for shape in shapes}) != 1:
        raise ValueError("they differ in another axis than the one along which they are joined")
    return [(*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])]


def _split(inputs: _Inputs) -> list[Shape]:
    data, sizes, count = inputs.shape(0), inputs.sizes(1), len(inputs.node.outputs)
    axis = _axis(inputs.integer("axis", 0), len(data))
    if inputs.integer("num_outputs", count) != count:
        raise ValueError(f"has num_outputs {inputs.integer('num_outputs', count)} and {count} outputs")
    if sizes is None:
        most = -(-data[axis] // count)
        sizes = [*[most] * (count - 1), data[axis] - most * (count - 1)]
    if sum(sizes) != data[axis] or len(sizes) != count:
        raise ValueError(f"splits {data[axis]} into {sizes}")
    return [(*data[:axis], size, *data[axis + 1 :]) for size in sizes]


def _slices(inputs: _Inputs, data: Shape) -> list[tuple[int, int, int, int]]:
    """Return axis, start, end and step of each sliced axis; an end of −1 lies before the first element."""
    starts, ends = inputs.sizes(1) or [], inputs.sizes(2) or []
    axes = inputs.sizes(3) or list(range(len(starts)))
    steps = inputs.sizes(4) or [1] * len(starts)
    return [
        (_axis(axis, len(data)), *slice(start, end, step).indices(data[_axis(axis, len(data))]))
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    ]


def _slice(inputs: _Inputs) -> list[Shape]:
    shape = [*inputs.shape(0)]
    for axis, start, end, step in _slices(inputs, inputs.shape(0)):
        shape[axis] = len(range(start, end, step))
    return [tuple(shape)]


def _gather(inputs: _Inputs) -> list[Shape]:
    data, indices = inputs.shape(0), inputs.shape(1)
    axis = _axis(inputs.integer("axis", 0), len(data))
    return [(*data[:axis], *indices, *data[axis + 1 :])]


def _gather_nd(inputs: _Inputs) -> list[Shape]:
    data, indices, batch = inputs.shape(0), inputs.shape(1), inputs.integer("batch_dims", 0)
    if not 0 <= batch <= batch + indices[-1] <= len(data) or batch >= len(indices):
        raise ValueError("its indices have too many axes")
    if data[:batch] != indices[:batch]:
        raise ValueError("its batches differ")
    return [(*indices[:-1], *data[batch + indices[-1] :])]


def _elements(inputs: _Inputs) -> list[Shape]:
    """Check that indices of single elements have no more of them than the data, on every axis but that of the index."""
    data, indices = inputs.shape(0), inputs.shape(1)
    axis = _axis(inputs.integer("axis", 0), len(data))
    if len(indices) != len(data) or any(size > data[other] for other, size in enumerate(indices) if other != axis):
        raise ValueError("its indices are of another shape")
    return [indices]


def _scatter_elements(inputs: _Inputs) -> list[Shape]:
    if [inputs.shape(2)] != _elements(inputs):
        raise ValueError("its updates are of another shape than its indices")
    return _same(inputs)


def _scatter_nd(inputs: _Inputs) -> list[Shape]:
    data, indices = inputs.shape(0), inputs.shape(1)
    if not indices or indices[-1] > len(data):
        raise ValueError("its indices have too many axes")
    if inputs.shape(2) != (*indices[:-1], *data[indices[-1] :]):
        raise ValueError("its updates are of another shape")
    return [data]


def _transpose(inputs: _Inputs) -> list[Shape]:
    data = inputs.shape(0)
    order = inputs.integers("perm") or tuple(reversed(range(len(data))))
    if sorted(order) != list(range(len(data))):
        raise ValueError(f"has the order {order}")
    return [tuple(data[axis] for axis in order)]


def _squeeze(inputs: _Inputs) -> list[Shape]:
    data, axes = inputs.shape(0), inputs.sizes(1)
    dropped = {_axis(axis, len(data)) for axis in axes or ()} or {axis for axis, size in enumerate(data) if size == 1}
    if any(data[axis] != 1 for axis in dropped):
        raise ValueError("drops an axis whose size is not 1")
    return [tuple(size for axis, size in enumerate(data) if axis not in dropped)]


def _unsqueeze(inputs: _Inputs) -> list[Shape]:
    data, axes = inputs.shape(0), inputs.sizes(1) or []
    rank = len(data) + len(axes)
    added = {_axis(axis, rank) for axis in axes}
    if len(added) != len(axes):
        raise ValueError(f"adds the axes {axes}")
    rest = iter(data)
    return [tuple(1 if axis in added else next(rest) for axis in range(rank))]


def _reshape(inputs: _Inputs) -> list[Shape]:
    data, wanted = inputs.shape(0), inputs.sizes(1) or []
    if not inputs.integer("allowzero", 0):
        wanted = [size or data[axis] for axis, size in enumerate(wanted)]
    total, known = math.prod(data), math.prod(size for size in wanted if size != -1)
    if wanted.count(-1) == 1 and known and total % known == 0:
        wanted[wanted.index(-1)] = total // known
    if math.prod(wanted) != total or any(size < 0 for size in wanted):
        raise ValueError(f"reshapes {total:,} elements to {wanted}")
    return [tuple(wanted)]


def _expand(inputs: _Inputs) -> list[Shape]:
    return [_broadcast([inputs.shape(0), tuple(inputs.sizes(1) or ())])]


def _range(inputs: _Inputs) -> list[Shape]:
    start, limit, delta = (inputs.number(index) for index in range(3))
    return [(max(math.ceil((limit - start) / delta), 0),)]


def _constant_of_shape(inputs: _Inputs) -> list[Shape]:
    return [tuple(inputs.sizes(0) or ())]


def _pad(inputs: _Inputs) -> list[Shape]:
    shape, pads = [*inputs.shape(0)], inputs.sizes(1) or []
    axes = inputs.sizes(3)
    axes = list(range(len(shape))) if axes is None else axes
    reflects = inputs.node.attributes.get("mode") == b"reflect"
    if len(pads) != 2 * len(axes):
        raise ValueError(f"has the pads {pads}")
    for index, axis in enumerate(axes):
        before, after, size = pads[index], pads[index + len(axes)], shape[_axis(axis, len(shape))]
        if min(before, after) < 0 or (reflects and max(before, after) >= size):
            raise ValueError(
                f"pads {size} by {before} and {after}, expected none below 0, and no reflection of as many"
            )
        shape[_axis(axis, len(shape))] += before + after
    return [tuple(shape)]


def _resize(inputs: _Inputs) -> list[Shape]:
    data, scales, sizes = inputs.shape(0), inputs.sizes(2), inputs.sizes(3)
    axes = inputs.integers("axes") or tuple(range(len(data)))
    if bool(scales) == bool(sizes):
        raise ValueError("has no scales and no sizes, or both")
    shape = [*data]
    for axis, value in zip(axes, scales or sizes or (), strict=True):
        axis = _axis(axis, len(data))
        shape[axis] = math.floor(data[axis] * value) if scales else value
    return [tuple(shape)]


def _top_k(inputs: _Inputs) -> list[Shape]:
    shape = [*inputs.shape(0)]
    axis = _axis(inputs.integer("axis", -1), len(shape))
    if not 0 <= inputs.number(1) <= shape[axis]:
        raise ValueError(f"chooses {inputs.number(1)} of {shape[axis]}")
    shape[axis] = inputs.number(1)
    return [tuple(shape), tuple(shape)]


def _attention(inputs: _Inputs) -> list[Shape]:
    query, key, value = (inputs.shape(index) for index in range(3))
    heads = inputs.integer("num_heads")
    if len(inputs.shapes) != 3 or not len(query) == len(key) == len(value) == 3:
        raise ValueError("expected queries, keys and values of 3 axes, and no more")
    if key != (query[0], key[1], query[2]) or value[:2] != key[:2]:
        raise ValueError("its queries, keys and values do not belong together")
    if heads < 1 or query[2] % heads or value[2] % heads:
        raise ValueError(f"has {heads} heads, expected a divisor of the channels")
    return [(*query[:2], value[2])]


_Rule = Callable[[_Inputs], list[Shape]]
_SAME = "Abs Cos Erf Floor Gelu Identity LeakyRelu Mish Neg Reciprocal Relu Round Sigmoid Sin Sqrt Tanh"
_BROADCASTING = "Add Div Equal Greater Less Max Min Mul Pow Sub Where"
# The number of inputs of operators that broadcast them, except of those that take any number (Max, Min).
_BINARY = ("Add", "Div", "Equal", "Greater", "Less", "Mul", "Pow", "Sub")
_COUNTS: Mapping[str, int] = {**dict.fromkeys(_BINARY, 2), "Where": 3}
_REDUCING = "ReduceL2 ReduceMax ReduceMean ReduceSum"
_RULES: Mapping[tuple[str, str], _Rule] = {
    **{("", name): _same for name in _SAME.split()},
    **{("", name): _broadcasting for name in _BROADCASTING.split()},
    **{("", name): _reduce for name in _REDUCING.split()},
    ("", "ArgMax"): _arg_max,
    ("", "BatchNormalization"): _batch_normalization,
    ("", "Cast"): _cast_shape,
    ("", "Clip"): _clip,
    ("", "Concat"): _concat,
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "Conv"): _conv,
    ("", "ConvTranspose"): _conv_transpose,
    ("", "DequantizeLinear"): _quantize,
    ("", "Expand"): _expand,
    ("", "Gather"): _gather,
    ("", "GatherElements"): _elements,
    ("", "GatherND"): _gather_nd,
    ("", "Gemm"): _gemm,
    ("", "GroupNormalization"): _group_normalization,
    ("", "LayerNormalization"): _layer_normalization,
    ("", "MatMul"): _matmul,
    ("", "MaxPool"): _max_pool,
    ("", "Pad"): _pad,
    ("", "QuantizeLinear"): _quantize,
    ("", "Range"): _range,
    ("", "Reshape"): _reshape,
    ("", "Resize"): _resize,
    ("", "ScatterElements"): _scatter_elements,
    ("", "ScatterND"): _scatter_nd,
    ("", "Shape"): lambda inputs: [(len(inputs.shape(0)),)],  # never reached: it is evaluated
    ("", "Slice"): _slice,
    ("", "Softmax"): _softmax,
    ("", "Split"): _split,
    ("", "Squeeze"): _squeeze,
    ("", "TopK"): _top_k,
    ("", "Transpose"): _transpose,
    ("", "Unsqueeze"): _unsqueeze,
    ("com.microsoft", "MultiHeadAttention"): _attention,
}

OPERATORS: frozenset[tuple[str, str]] = frozenset(_RULES)
"""Domain and name of every operator that the exporter writes: for its tasks, precisions, parts and slices, and for the
activation functions that a checkpoint's configuration may name (Erf, LeakyRelu, Mish, Pow). A new one needs a rule."""

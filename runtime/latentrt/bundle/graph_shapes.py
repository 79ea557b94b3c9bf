"""The shapes of all tensors of an ONNX graph for inputs of given sizes, and the memory that they need together.

Nothing is computed but sizes: a graph of a few bytes can ask for terabytes, and a backend that folds constants would
allocate them while it loads the graph. There is a rule for each operator that the exporter writes. Small tensors that
hold sizes (the outputs of `Shape`, and values calculated from them) are evaluated.

Semantics: the ONNX operators of opset 21, and `MultiHeadAttention` of ONNX Runtime's `com.microsoft`. The attributes of
nodes are of the types, and have the values, that `latentrt.bundle.graph_attributes` allows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.onnx_graph import GraphFormatError, Node, OnnxGraph, Tensor
from latentrt.bundle.onnx_types import ELEMENT_TYPES, ElementType
from latentrt.bundle.tensors import MAX_AXES

__all__ = ["INPUT_COUNTS", "OPERATORS", "Shape", "Values", "infer_values", "peak_bytes", "read_values"]

Shape = tuple[int, ...]
Values = NDArray[Any]

# Elements of a tensor that is evaluated; larger ones are no sizes.
_MAX_VALUES = 256
# Numbers that one input of a node may state as sizes, axes or pads; a Split has up to 64 outputs.
_MAX_SIZES = 64
# Elements that all evaluated nodes of a graph read and write together. The exporter's graphs have some hundred such
# nodes of a few elements each.
_MAX_EVALUATED = 1 << 20
# Elements along one axis of a window: kernel, strides, dilations and pads.
_MAX_WINDOW = 1 << 16
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
        """Return the shape of an input, which must not be empty. Lists of sizes or axes may be: see `sizes`."""
        found = self.shapes[index] if index < len(self.shapes) else None
        if found is None:
            raise ValueError(f"has no input {index}")
        if 0 in found:
            raise ValueError(f"has input {index} of shape {list(found)}, expected no size of 0")
        return found

    def check_shape(self, index: int, *expected: Shape) -> None:
        """Check that an input, unless it is left out, has one of these shapes."""
        found = self.shapes[index] if index < len(self.shapes) else None
        if found is not None and found not in expected:
            raise ValueError(f"has input {index} of shape {list(found)}, expected {list(expected[0])}")

    def sizes(self, index: int) -> list[Any] | None:
        """Return the values of an input that holds sizes, as numbers; None where it is left out.

        Raises:
            ValueError: its values depend on the contents of other tensors, or are too many.
        """
        if index >= len(self.shapes) or self.shapes[index] is None:
            return None
        found = self.values[index]
        if found is None:
            raise ValueError("has a size that depends on the contents of a tensor")
        if found.size > _MAX_SIZES:
            raise ValueError(f"has {found.size} numbers in input {index}, expected at most {_MAX_SIZES}")
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
        GraphFormatError: a node does not fit its inputs, a size depends on the contents of a tensor, a computed tensor
            is empty, or the sizes take too long to evaluate.
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
        self._evaluated = 0  # elements so far
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
            rule = _RULES[node.domain, node.op_type]
            _check_count(node, *INPUT_COUNTS[node.domain, node.op_type])
            shapes = rule(inputs)
            if len(shapes) != len(node.outputs):
                raise ValueError(f"has {len(node.outputs)} outputs, expected {len(shapes)}")
            for shape in shapes:
                _check_output(shape)
            made = self._evaluate(inputs, shapes[0])
        except (ValueError, IndexError, OverflowError, ZeroDivisionError, TypeError) as error:
            known = [None if name not in self.shapes else list(self.shapes[name]) for name in node.inputs]
            raise GraphFormatError(
                f"has node '{node.name}', whose {node.op_type} does not fit its inputs {known}: {error}"
            ) from None
        for name, shape in zip(node.outputs, shapes, strict=True):
            self.shapes[name] = shape
        if made is not None:
            self.values[node.outputs[0]] = made

    def _evaluate(self, inputs: _Inputs, shape: Shape) -> Values | None:
        """Return the output, of a known shape, of a node that calculates with sizes; None for any other node."""
        evaluate = _EVALUATED.get(inputs.node.op_type)
        if evaluate is None or math.prod(shape) > _MAX_VALUES:
            return None
        if evaluate is not _evaluate_shape:
            if any(
                value is None and known is not None for value, known in zip(inputs.values, inputs.shapes, strict=True)
            ):
                return None
            self._evaluated += sum(value.size for value in inputs.values if value is not None)
        self._evaluated += math.prod(shape)
        if self._evaluated > _MAX_EVALUATED:
            raise ValueError(f"its graph calculates with more than {_MAX_EVALUATED:,} sizes, expected at most that")
        made = evaluate(inputs)
        if made.shape != shape:
            raise ValueError(f"makes sizes of shape {list(made.shape)}, expected {list(shape)}")
        return made


def _check_count(node: Node, least: int, most: int) -> None:
    """Check the number of a node's inputs, and that it has those that may not be left out."""
    count = len(node.inputs)
    if not least <= count <= most:
        expected = str(least) if least == most else f"{least} to {most}" if most < _ANY else f"at least {least}"
        raise ValueError(f"has {count} inputs, expected {expected}")
    if "" in node.inputs[: least if most < _ANY else count]:
        raise ValueError(f"leaves out input {node.inputs.index('')}, which it needs")


def _check_output(shape: Shape) -> None:
    """Check the number of axes of an output, and that it is not empty.

    The exporter's graphs compute no empty tensor. From one, backends divide by a size of 0 (`MultiHeadAttention`), or
    return memory that nothing was written to (a padded `Conv`, `MatMul`).
    """
    if len(shape) > MAX_AXES or any(size < 1 for size in shape):
        raise ValueError(f"its output would have the shape {list(shape)}, expected at most {MAX_AXES} sizes from 1")


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
        return np.asarray(function(*(_array(inputs, index) for index in range(len(inputs.values)))))

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


def _evaluate_shape(inputs: _Inputs) -> Values:
    shape = inputs.shape(0)
    return np.array(shape[inputs.integer("start", 0) : inputs.integer("end", len(shape))], np.int64)


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
    "Max": _elementwise(lambda *arrays: functools.reduce(np.maximum, arrays)),
    "Min": _elementwise(lambda *arrays: functools.reduce(np.minimum, arrays)),
    "Mul": _arithmetic(np.multiply),
    "Neg": _arithmetic(np.negative),
    "Reshape": lambda inputs: _array(inputs, 0).reshape(_reshape(inputs)[0]),
    "Round": _elementwise(np.rint),
    "Shape": _evaluate_shape,
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


def _shape(inputs: _Inputs) -> list[Shape]:
    return [_evaluate_shape(inputs).shape]


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


def _axes(axes: Iterable[int], rank: int) -> tuple[int, ...]:
    """Return axes counted from the first. What a repeated one means is not defined, and differs between backends."""
    found = tuple(_axis(axis, rank) for axis in axes)
    if len(set(found)) != len(found):
        raise ValueError(f"has the axes {list(found)}, expected each once")
    return found


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
    if rank < 1 or not len(kernel) == len(strides) == len(dilations) == rank or len(pads) != 2 * rank:
        raise ValueError("its window has another number of axes")
    for name, least, sizes in (
        ("kernel_shape", 1, kernel),
        ("strides", 1, strides),
        ("dilations", 1, dilations),
        ("pads", 0, pads),
    ):
        if not least <= min(sizes) <= max(sizes) <= _MAX_WINDOW:
            raise ValueError(f"has {name} {list(sizes)}, expected {least} to {_MAX_WINDOW:,}")
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
    if any(not 0 <= more < stride for more, stride in zip(extra, strides, strict=True)):
        raise ValueError(f"has output_padding {list(extra)}, expected 0 to less than the strides {list(strides)}")
    axes = zip(spatial, strides, extents, pads, extra, strict=True)
    sizes = (stride * (size - 1) + more + extent - pad for size, stride, extent, pad, more in axes)
    return [(data[0], weight[1] * group, *sizes)]


def _max_pool(inputs: _Inputs) -> list[Shape]:
    data, kernel = inputs.shape(0), inputs.integers("kernel_shape") or ()
    pads = inputs.integers("pads") or ()
    # Else a window would lie in the pads alone, and have no largest element.
    if any(pad >= size for pad, size in zip(pads, (*kernel, *kernel), strict=False)):
        raise ValueError(f"has the pads {list(pads)}, expected each below the kernel {list(kernel)}")
    return [(*data[:2], *_slide(data[2:], *_window(inputs, len(data) - 2, kernel)))]


def _reduce(inputs: _Inputs) -> list[Shape]:
    data, axes = inputs.shape(0), inputs.sizes(1)
    if not axes:
        if inputs.integer("noop_with_empty_axes", 0):
            return [data]
        axes = list(range(len(data)))
    reduced, keep = _axes(axes, len(data)), inputs.integer("keepdims", 1)
    return [tuple(1 if axis in reduced else size for axis, size in enumerate(data) if keep or axis not in reduced)]


def _arg_max(inputs: _Inputs) -> list[Shape]:
    data = inputs.shape(0)
    axis = _axis(inputs.integer("axis", 0), len(data))
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
    axes = _axes(inputs.sizes(3) or range(len(starts)), len(data))
    steps = inputs.sizes(4) or [1] * len(starts)
    return [
        (axis, *slice(start, end, step).indices(data[axis]))
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
    dropped = _axes(axes or (), len(data)) or tuple(axis for axis, size in enumerate(data) if size == 1)
    if any(data[axis] != 1 for axis in dropped):
        raise ValueError("drops an axis whose size is not 1")
    return [tuple(size for axis, size in enumerate(data) if axis not in dropped)]


def _unsqueeze(inputs: _Inputs) -> list[Shape]:
    data, axes = inputs.shape(0), inputs.sizes(1) or []
    rank = len(data) + len(axes)
    added = _axes(axes, rank)
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
    named = inputs.sizes(3)
    axes = _axes(range(len(shape)) if named is None else named, len(shape))
    inputs.check_shape(2, (), (1,))
    reflects = inputs.node.attributes.get("mode") == b"reflect"
    if len(pads) != 2 * len(axes):
        raise ValueError(f"has the pads {pads}")
    for index, axis in enumerate(axes):
        before, after, size = pads[index], pads[index + len(axes)], shape[axis]
        if min(before, after) < 0 or (reflects and max(before, after) >= size):
            raise ValueError(
                f"pads {size} by {before} and {after}, expected none below 0, and no reflection of as many"
            )
        shape[axis] += before + after
    return [tuple(shape)]


def _resize(inputs: _Inputs) -> list[Shape]:
    data, scales, sizes = inputs.shape(0), inputs.sizes(2), inputs.sizes(3)
    axes = _axes(inputs.integers("axes") or range(len(data)), len(data))
    if bool(scales) == bool(sizes):
        raise ValueError("has no scales and no sizes, or both")
    shape = [*data]
    for axis, value in zip(axes, scales or sizes or (), strict=True):
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
    if not len(query) == len(key) == len(value) == 3:
        raise ValueError("expected queries, keys and values of 3 axes")
    if key != (query[0], key[1], query[2]) or value[:2] != key[:2]:
        raise ValueError("its queries, keys and values do not belong together")
    if heads < 1 or query[2] % heads or value[2] % heads:
        raise ValueError(f"has {heads} heads, expected a divisor of the channels")
    return [(*query[:2], value[2])]


_Rule = Callable[[_Inputs], list[Shape]]
_SAME = "Abs Cos Erf Floor Gelu Identity LeakyRelu Mish Neg Reciprocal Relu Round Sigmoid Sin Sqrt Tanh"
_BROADCASTING = "Add Div Equal Greater Less Max Min Mul Pow Sub Where"
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
    ("", "Shape"): _shape,
    ("", "Slice"): _slice,
    ("", "Softmax"): _softmax,
    ("", "Split"): _split,
    ("", "Squeeze"): _squeeze,
    ("", "TopK"): _top_k,
    ("", "Transpose"): _transpose,
    ("", "Unsqueeze"): _unsqueeze,
    ("com.microsoft", "MultiHeadAttention"): _attention,
}

# ONNX's number for any number of inputs. A node of a graph that is read has 64 at most.
_ANY = (1 << 31) - 1
_NAMES_BY_COUNT: Mapping[tuple[int, int], str] = {
    (1, 1): f"{_SAME} ArgMax Cast ConstantOfShape MaxPool Shape Softmax Transpose",
    (1, 2): f"{_REDUCING} Split Squeeze",
    (1, 3): "Clip",
    (1, 4): "Resize",
    (1, _ANY): "Concat Max Min",
    (2, 2): (
        "Add Div Equal Expand Gather GatherElements GatherND Greater Less MatMul Mul Pow Reshape Sub TopK Unsqueeze"
    ),
    (2, 3): "Conv ConvTranspose DequantizeLinear Gemm LayerNormalization QuantizeLinear",
    (2, 4): "Pad",
    (3, 3): "GroupNormalization Range ScatterElements ScatterND Where",
    (3, 5): "Slice",
    (5, 5): "BatchNormalization",
}
INPUT_COUNTS: Mapping[tuple[str, str], tuple[int, int]] = {
    **{("", name): count for count, names in _NAMES_BY_COUNT.items() for name in names.split()},
    ("com.microsoft", "MultiHeadAttention"): (3, 3),  # no bias, mask or earlier keys
}
"""Domain and name of every operator → the fewest and the most inputs of a node, as ONNX defines them. The fewest may
not be left out."""

OPERATORS: frozenset[tuple[str, str]] = frozenset(_RULES)
"""Domain and name of every operator that the exporter writes: for its tasks, precisions, parts and slices, and for the
activation functions that a checkpoint's configuration may name (Erf, LeakyRelu, Mish, Pow). A new one needs a rule."""

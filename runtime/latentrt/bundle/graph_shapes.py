"""The shapes of all tensors of an ONNX graph for inputs of given sizes, and the memory that they need together.

Nothing is computed but sizes: a graph of a few bytes can ask for terabytes, and a backend that folds constants would
allocate them while it loads the graph. There is a rule for each operator that the exporter writes. Small tensors that
hold sizes (the outputs of `Shape`, and values calculated from them) are evaluated.

Semantics: the ONNX operators of opset 21, and `MultiHeadAttention` of ONNX Runtime's `com.microsoft`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.onnx_graph import GraphFormatError, Node, OnnxGraph

__all__ = ["OPERATORS", "Shape", "infer_shapes", "peak_bytes"]

Shape = tuple[int, ...]
Values = NDArray[Any]

# Larger tensors are no sizes.
_MOST_VALUES = 256
# All elements count as float32: most are, and none of those that are large is wider.
_BYTES_PER_ELEMENT = 4
_WHOLE_DTYPES = {2, 3, 6, 7}
# Operators that make whole numbers, those that may, and those whose output is of the type of input 1.
_OF_WHOLE_NUMBERS = {"Shape", "ArgMax", "QuantizeLinear", "ConstantOfShape"}
_TYPED_BY_INPUT_1 = {"Where", "DequantizeLinear"}
_DTYPES: Mapping[int, Any] = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
}


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

    def integer(self, name: str, default: int) -> int:
        """Return an attribute of the node that is a whole number."""
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


def infer_shapes(graph: OnnxGraph, sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Return the shape of every tensor.

    Args:
        graph: its nodes in an order in which they can run.
        sizes: the size of each named axis of its inputs.

    Raises:
        GraphFormatError: a node does not fit its inputs, or a size depends on the contents of a tensor.
    """
    return _Inference(graph, sizes).shapes


def peak_bytes(graph: OnnxGraph, shapes: Mapping[str, Shape]) -> tuple[int, str]:
    """Return the most memory that inputs and computed tensors take at one time, and the node that takes it.

    A tensor is released after the last node that reads it; each counts as float32. Those that depend on no input's
    contents are never released: a backend computes all of them while it loads the graph, before it drops any.
    """
    last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    kept = len(graph.nodes)
    last_use.update(dict.fromkeys((*graph.outputs, *_find_foldable(graph)), kept))
    place = "inputs"
    held = {name: math.prod(shapes[name]) * _BYTES_PER_ELEMENT for name in graph.inputs}
    live = peak = sum(held.values())
    for index, node in enumerate(graph.nodes):
        for name in node.outputs:
            if name:
                held[name] = math.prod(shapes[name]) * _BYTES_PER_ELEMENT
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
        self._values: dict[str, Values] = {}
        self._whole = {name for name, each in graph.initializers.items() if each.dtype in _WHOLE_DTYPES}
        self._whole.update(name for name, each in graph.inputs.items() if each.dtype in _WHOLE_DTYPES)
        for name, tensor in graph.initializers.items():
            self.shapes[name] = tensor.shape
            if tensor.raw is not None and math.prod(tensor.shape) <= _MOST_VALUES:
                self._values[name] = np.frombuffer(tensor.raw, _DTYPES[tensor.dtype]).reshape(tensor.shape)
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
                [self._values.get(name) for name in node.inputs],
            )
            self._check_division(node)
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
        self._whole.update(name for index, name in enumerate(node.outputs) if self._is_whole(node, index))
        if made is not None and made.size <= _MOST_VALUES:
            self._values[node.outputs[0]] = made

    def _is_whole(self, node: Node, output: int) -> bool:
        """Return whether a node makes whole numbers; where that is unknown, it may."""
        if node.op_type == "Cast":
            return node.attributes.get("to") in _WHOLE_DTYPES
        if node.op_type in _TYPED_BY_INPUT_1:
            return len(node.inputs) > 1 and node.inputs[1] in self._whole
        if node.op_type in _OF_WHOLE_NUMBERS or (node.op_type == "TopK" and output == 1):
            return True
        return bool(node.inputs) and node.inputs[0] in self._whole

    def _check_division(self, node: Node) -> None:
        """Check that whole numbers are divided by known ones above 0.

        The processor ends a program that divides by 0, or the least number by -1.
        """
        if node.op_type != "Div" or node.inputs[1] not in self._whole:
            return
        divisor = self._values.get(node.inputs[1])
        if divisor is None or not (divisor > 0).all():
            raise ValueError("divides whole numbers by others than known ones above 0")

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
    assert value is not None, "all inputs of an evaluated node are known"
    return value


def _elementwise(function: Callable[..., Any]) -> Callable[[_Inputs], Values]:
    def evaluate(inputs: _Inputs) -> Values:
        arrays = [value for value in inputs.values if value is not None]
        if math.prod(_broadcast([array.shape for array in arrays])) > _MOST_VALUES:
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
    return _array(inputs, 0).astype(_DTYPES[inputs.integer("to", 0)])


def _evaluate_slice(inputs: _Inputs) -> Values:
    data = _array(inputs, 0)
    index: list[slice] = [slice(None)] * data.ndim
    for axis, start, end, step in _slices(inputs, data.shape):
        index[axis] = slice(start, end if end >= 0 else None, step)
    return data[tuple(index)]


_EVALUATED: Mapping[str, Callable[[_Inputs], Values]] = {
    "Abs": _elementwise(np.abs),
    "Add": _elementwise(np.add),
    "Cast": _cast,
    "Concat": lambda inputs: np.concatenate(
        [_array(inputs, index) for index in range(len(inputs.values))], axis=inputs.integer("axis", 0)
    ),
    "Div": _elementwise(_divide),
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
    "Mul": _elementwise(np.multiply),
    "Neg": _elementwise(np.negative),
    "Reshape": lambda inputs: _array(inputs, 0).reshape(_reshape(inputs)[0]),
    "Round": _elementwise(np.rint),
    "Slice": _evaluate_slice,
    "Sqrt": _elementwise(np.sqrt),
    "Squeeze": lambda inputs: _array(inputs, 0).reshape(_squeeze(inputs)[0]),
    "Sub": _elementwise(np.subtract),
    "Unsqueeze": lambda inputs: _array(inputs, 0).reshape(_unsqueeze(inputs)[0]),
    "Where": _elementwise(np.where),
}


# --- Shapes ----------------------------------------------------------------------------------------------------------


def _same(inputs: _Inputs) -> list[Shape]:
    return [inputs.shape(0)]


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
    return [(rows, columns)]


def _window(inputs: _Inputs, rank: int, kernel: Shape) -> tuple[Shape, Shape, Shape]:
    """Return strides, extents (of the dilated kernel) and pads (of both ends together) for each spatial axis."""
    ones = (1,) * rank
    strides, dilations = inputs.integers("strides") or ones, inputs.integers("dilations") or ones
    pads = inputs.integers("pads") or (0,) * (2 * rank)
    if inputs.node.attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise ValueError("has auto_pad, expected explicit pads")
    if not len(kernel) == len(strides) == len(dilations) == len(pads) // 2 == rank or min(*strides, *dilations) < 1:
        raise ValueError("its window has another number of axes")
    extents = tuple((size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True))
    return strides, extents, tuple(pads[axis] + pads[axis + rank] for axis in range(rank))


def _conv(inputs: _Inputs) -> list[Shape]:
    data, weight = inputs.shape(0), inputs.shape(1)
    spatial = data[2:]
    strides, extents, pads = _window(inputs, len(spatial), inputs.integers("kernel_shape") or weight[2:])
    return [(data[0], weight[0], *_slide(spatial, strides, extents, pads))]


def _slide(spatial: Shape, strides: Shape, extents: Shape, pads: Shape) -> Shape:
    axes = zip(spatial, strides, extents, pads, strict=True)
    return tuple((size + pad - extent) // stride + 1 for size, stride, extent, pad in axes)


def _conv_transpose(inputs: _Inputs) -> list[Shape]:
    data, weight = inputs.shape(0), inputs.shape(1)
    spatial = data[2:]
    strides, extents, pads = _window(inputs, len(spatial), inputs.integers("kernel_shape") or weight[2:])
    extra = inputs.integers("output_padding") or (0,) * len(spatial)
    axes = zip(spatial, strides, extents, pads, extra, strict=True)
    sizes = (stride * (size - 1) + more + extent - pad for size, stride, extent, pad, more in axes)
    return [(data[0], weight[1] * inputs.integer("group", 1), *sizes)]


def _max_pool(inputs: _Inputs) -> list[Shape]:
    data, kernel = inputs.shape(0), inputs.integers("kernel_shape") or ()
    if inputs.integer("ceil_mode", 0):
        raise ValueError("rounds sizes up, expected ceil_mode 0")
    return [(*data[:2], *_slide(data[2:], *_window(inputs, len(data) - 2, kernel)))]


def _reduce(inputs: _Inputs) -> list[Shape]:
    data, axes = inputs.shape(0), inputs.sizes(1)
    if not axes:
        if inputs.integer("noop_with_empty_axes", 0):
            return [data]
        axes = list(range(len(data)))
    reduced, keep = {_axis(axis, len(data)) for axis in axes}, inputs.integer("keepdims", 1)
    return [tuple(1 if axis in reduced else size for axis, size in enumerate(data) if keep or axis not in reduced)]


def _arg_max(inputs: _Inputs) -> list[Shape]:
    data = inputs.shape(0)
    axis = _axis(inputs.integer("axis", 0), len(data))
    return [(*data[:axis], *((1,) if inputs.integer("keepdims", 1) else ()), *data[axis + 1 :])]


def _concat(inputs: _Inputs) -> list[Shape]:
    shapes = [inputs.shape(index) for index in range(len(inputs.shapes))]
    axis = _axis(inputs.integer("axis", 0), len(shapes[0]))
    if len({(*shape[:axis], -1, *shape[axis + 1 :]) for shape in shapes}) != 1:
        raise ValueError("they differ in another axis than the one along which they are joined")
    return [(*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])]


def _split(inputs: _Inputs) -> list[Shape]:
    data, sizes, count = inputs.shape(0), inputs.sizes(1), len(inputs.node.outputs)
    axis = _axis(inputs.integer("axis", 0), len(data))
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
    if not 0 <= batch <= batch + indices[-1] <= len(data):
        raise ValueError("its indices have too many axes")
    return [(*indices[:-1], *data[batch + indices[-1] :])]


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
    if len(pads) != 2 * len(axes):
        raise ValueError(f"has the pads {pads}")
    for index, axis in enumerate(axes):
        shape[_axis(axis, len(shape))] += pads[index] + pads[index + len(axes)]
    return [tuple(shape)]


def _resize(inputs: _Inputs) -> list[Shape]:
    data, scales, sizes = inputs.shape(0), inputs.sizes(2), inputs.sizes(3)
    axes = inputs.integers("axes") or tuple(range(len(data)))
    policy = inputs.node.attributes.get("keep_aspect_ratio_policy", b"stretch")
    if policy != b"stretch" or bool(scales) == bool(sizes):
        raise ValueError("has no scales and no sizes, or both, or keeps the aspect ratio")
    shape = [*data]
    for axis, value in zip(axes, scales or sizes or (), strict=True):
        axis = _axis(axis, len(data))
        shape[axis] = math.floor(data[axis] * value) if scales else value
    return [tuple(shape)]


def _top_k(inputs: _Inputs) -> list[Shape]:
    shape = [*inputs.shape(0)]
    axis = _axis(inputs.integer("axis", -1), len(shape))
    shape[axis] = min(inputs.number(1), shape[axis])
    return [tuple(shape), tuple(shape)]


def _attention(inputs: _Inputs) -> list[Shape]:
    query, key, value = (inputs.shape(index) for index in range(3))
    if not len(query) == len(key) == len(value) == 3:
        raise ValueError("expected queries, keys and values of 3 axes")
    return [(*query[:2], value[2])]


_Rule = Callable[[_Inputs], list[Shape]]
_SAME = (
    "Abs BatchNormalization Cast Clip Cos DequantizeLinear Erf Floor Gelu GroupNormalization Identity "
    "LayerNormalization LeakyRelu Mish Neg QuantizeLinear Reciprocal Relu Round ScatterElements ScatterND Sigmoid Sin "
    "Softmax Sqrt Tanh"
)
_BROADCASTING = "Add Div Equal Greater Less Max Min Mul Pow Sub Where"
_REDUCING = "ReduceL2 ReduceMax ReduceMean ReduceSum"
_RULES: Mapping[tuple[str, str], _Rule] = {
    **{("", name): _same for name in _SAME.split()},
    **{("", name): _broadcasting for name in _BROADCASTING.split()},
    **{("", name): _reduce for name in _REDUCING.split()},
    ("", "ArgMax"): _arg_max,
    ("", "Concat"): _concat,
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "Conv"): _conv,
    ("", "ConvTranspose"): _conv_transpose,
    ("", "Expand"): _expand,
    ("", "Gather"): _gather,
    ("", "GatherElements"): lambda inputs: [inputs.shape(1)],
    ("", "GatherND"): _gather_nd,
    ("", "Gemm"): _gemm,
    ("", "MatMul"): _matmul,
    ("", "MaxPool"): _max_pool,
    ("", "Pad"): _pad,
    ("", "Range"): _range,
    ("", "Reshape"): _reshape,
    ("", "Resize"): _resize,
    ("", "Shape"): lambda inputs: [(len(inputs.shape(0)),)],  # never reached: it is evaluated
    ("", "Slice"): _slice,
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

"""How is a decoder cut, so that its last levels can be computed a few rows at a time?

The whole is `head`, then `attention` (a few queries at a time), then `neck`, then the stages, in their order
(`slice.0`, …). A stage ends with the one convolution of 3 × 3 that it has, as a norm behind that needs the whole of its
result. What runs them is `latentrt.decode.slices`.

Before the last two levels everything is small, a sixteenth of the last one's rows and columns, so that stays in one
piece. The scores of attention are not: they grow with the square of the picture's area.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from latentrt.bundle.manifest import PartName
from latentrt.bundle.tensors import TensorSpec
from latentrt.errors import ExportError
from latentrt_export.graphs.cut import cut

__all__ = ["Cut", "cuts", "slice_decoder"]

# The levels, from the last one back, whose convolutions become stages.
_LEVELS_IN_STAGES = 2
_ATTENTION = "decoder.mid_block.attentions.0"
_BEFORE_ATTENTION = "decoder.mid_block.resnets.0/Add"


@dataclass(frozen=True)
class Cut:
    """What a stage is, by names of the whole graph's values."""

    takes: str
    gives: str
    residual: str | None = None
    grows: bool = False

    @property
    def finishes(self) -> bool:
        """Whether it makes pixels."""
        return self.gives == "pixels"


def cuts(model: ir.Model) -> list[Cut]:
    """What the stages of a decoder's graph are, in their order.

    Raises:
        ExportError: the graph is none that can be cut like that.
    """
    return [*_stages(_values(model))]


def slice_decoder(model: ir.Model) -> dict[PartName, ir.Model]:
    """Cut a decoder's finished graph into head, attention, neck and stages.

    Args:
        model: the whole; left as it was. The parts share its tensors.

    Returns:
        The parts, in the order in which they are run. All their inputs are float32.

    Raises:
        ExportError: the graph is none that can be cut like that.
    """
    values, stages = _values(model), cuts(model)
    parts = _whole_parts(model, values, stages[0].takes)
    for number, stage in enumerate(stages):
        parts[f"slice.{number}"] = _stage(model, values, stage)
    return parts


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for node in model.graph for value in node.outputs}


def _stages(values: dict[str, ir.Value]) -> Iterator[Cut]:
    blocks = _count(values, r"decoder\.up_blocks\.(\d+)\.resnets\.0\.conv1/Conv")
    if not blocks or "pixels" not in values:
        raise _refused("no up_blocks and pixels in the decoder's graph")
    first = max(blocks - _LEVELS_IN_STAGES, 0)
    if first > 0:
        yield _upsampler(values, first - 1)
    for block in range(first, blocks):
        for resnet in range(_count(values, rf"decoder\.up_blocks\.{block}\.resnets\.(\d+)\.conv1/Conv")):
            yield from _resnet(values, f"decoder.up_blocks.{block}.resnets.{resnet}")
        if f"decoder.up_blocks.{block}.upsamplers.0.conv/Conv" in values:
            yield _upsampler(values, block)
    yield Cut(takes=_taken_by(values, "decoder.conv_norm_out/GroupNormalization"), gives="pixels")


def _count(values: dict[str, ir.Value], pattern: str) -> int:
    return len({found[1] for name in values if (found := re.fullmatch(pattern, name))})


def _upsampler(values: dict[str, ir.Value], block: int) -> Cut:
    path = f"decoder.up_blocks.{block}.upsamplers.0"
    return Cut(takes=_taken_by(values, f"{path}/Resize"), gives=_rounded(values, f"{path}.conv/Conv"), grows=True)


def _resnet(values: dict[str, ir.Value], path: str) -> Iterator[Cut]:
    residual, hidden = _taken_by(values, f"{path}.norm1/GroupNormalization"), _rounded(values, f"{path}.conv1/Conv")
    yield Cut(takes=residual, gives=hidden)
    yield Cut(takes=hidden, gives=f"{path}/Add", residual=residual)


def _rounded(values: dict[str, ir.Value], name: str) -> str:
    """The value that has this name, or what it was rounded to in an int8 graph: what is behind it takes that."""
    value = values[name]
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        readers = [use.node for use in value.uses()]
        if [node.op_type for node in readers] != [operator]:
            break
        value = readers[0].outputs[0]
    return str(value.name)


def _taken_by(values: dict[str, ir.Value], name: str) -> str:
    node = values[name].producer() if name in values else None
    source = node.inputs[0] if node is not None else None
    if source is None:
        raise _refused(f"no {name} in the decoder's graph")
    return str(source.name)


def _whole_parts(model: ir.Model, values: dict[str, ir.Value], last: str) -> dict[PartName, ir.Model]:
    """Everything before the stages; without attention in the middle that is one part."""
    ends = {name: f"{_ATTENTION}.to_{name[0]}/Add" for name in ("queries", "keys", "values")}
    attended = f"{_ATTENTION}.to_out.0/Add"
    if not {*ends.values(), attended, _BEFORE_ATTENTION} <= values.keys():
        head = cut(model, inputs=["latents"], takes={}, gives={last: "result"})
        _describe(head, result=_sides_of_latents(values[last]))
        return {"head": head}
    width = _channels(values[attended], -1)
    all_tokens, some = ("batch", "tokens", width), ("batch", "queries", width)
    features = _plane(values[_BEFORE_ATTENTION], "height", "width")
    gives = {_BEFORE_ATTENTION: "features", **{end: name for name, end in ends.items()}}
    head = cut(model, inputs=["latents"], takes={}, gives=gives)
    _describe(head, features=features, **dict.fromkeys(ends, all_tokens))
    takes = {end: TensorSpec(name, "float32", some if name == "queries" else all_tokens) for name, end in ends.items()}
    attention = cut(model, inputs=[], takes=takes, gives={attended: "attended"})
    _describe(attention, attended=some)
    takes = {
        attended: TensorSpec("attended", "float32", all_tokens),
        _BEFORE_ATTENTION: TensorSpec("features", "float32", features),
    }
    neck = cut(model, inputs=[], takes=takes, gives={last: "result"})
    _describe(neck, result=_sides_of_latents(values[last]))
    return {"head": head, "attention": attention, "neck": neck}


def _stage(model: ir.Model, values: dict[str, ir.Value], stage: Cut) -> ir.Model:
    takes = {stage.takes: TensorSpec("features", "float32", _plane(values[stage.takes], "halo_rows", "width"))}
    if stage.residual is not None:
        shape = _plane(values[stage.residual], "rows", "width")
        takes[stage.residual] = TensorSpec("residual", "float32", shape)
    called = "pixels" if stage.finishes else "result"
    part = cut(model, inputs=[], takes=takes, gives={stage.gives: called})
    rows, width = ("2*rows", "2*width") if stage.grows else ("rows", "width")
    if stage.finishes:
        _describe(part, pixels=("batch", rows, width, _channels(values["pixels"], -1)))
    else:
        _describe(part, result=_plane(values[stage.gives], rows, width))
    norms = [node for node in part.graph if node.op_type == "GroupNormalization"]
    if len(norms) != (not stage.grows):
        raise _refused(f"{len(norms)} norms before {stage.gives}")
    for norm in norms:
        _take_statistics(part.graph, norm)
    _take_halo(part.graph, stage)
    return part


def _take_statistics(graph: ir.Graph, norm: ir.Node) -> None:
    """Have a group norm given the mean and the variance, (B, G), which a band does not know: it becomes a scale and a
    shift of each channel."""
    groups = norm.attributes["num_groups"].as_int()
    mean, variance = (_input(graph, name, ("batch", groups)) for name in ("mean", "variance"))
    features, gamma, beta = norm.inputs
    make = _Making(graph, norm)
    epsilon = make.constant("epsilon", np.float32(norm.attributes["epsilon"].as_float()))
    grouped, last = make.constant("grouped", np.array([1, groups, -1])), make.constant("last", np.array([2]))
    channels = make.constant("channels", np.array([0, -1, 1, 1]))
    deviation = make("Unsqueeze", make("Sqrt", make("Add", variance, epsilon)), last)  # (B, G, 1)
    scale = make("Div", make("Reshape", gamma, grouped), deviation)  # (B, G, C / G)
    moved = make("Mul", make("Unsqueeze", mean, last), scale)
    shift = make("Sub", make("Reshape", beta, grouped), moved)
    scaled = make("Mul", features, make("Reshape", scale, channels))
    normed = make("Add", scaled, make("Reshape", shift, channels))
    ir.convenience.replace_all_uses_with(norm.outputs[0], normed)
    graph.remove(norm, safe=True)


def _take_halo(graph: ir.Graph, stage: Cut) -> None:
    """Have the convolution take a row above and one below from its input, in place of rows of zeros.

    What lies outside of the picture is zero behind the activation, not before it, so `inside` says which rows do. In
    front of a nearest neighbour it makes no difference, and two of the four rows made of the halo are too many.
    """
    convolutions = [
        node for node in graph if node.op_type == "Conv" and list(node.attributes["kernel_shape"].as_ints()) == [3, 3]
    ]
    if [list(node.attributes["pads"].as_ints()) for node in convolutions] != [[1, 1, 1, 1]]:
        raise _refused(f"another convolution than one of 3 × 3 at {stage.gives}")
    (convolution,) = convolutions
    convolution.attributes["pads"] = ir.AttrInt64s("pads", [0, 1, 0, 1])
    reader = _first_reader(convolution)
    make = _Making(graph, reader)
    if stage.grows:
        first, end, axis = (
            make.constant(name, np.array([at])) for name, at in (("first", 1), ("end", -1), ("axis", 2))
        )
        taken = make("Slice", reader.inputs[0], first, end, axis)
    else:
        taken = make("Mul", reader.inputs[0], _input(graph, "inside", ("batch", 1, "halo_rows", 1)))
    reader.replace_input_with(0, taken)


def _first_reader(convolution: ir.Node) -> ir.Node:
    """What reads a convolution's input: itself or, in an int8 graph, what rounds it. Nothing may stand between those,
    or backends multiply floats."""
    node = convolution
    for operator in ("DequantizeLinear", "QuantizeLinear"):
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is None or source.op_type != operator:
            break
        node = source
    return node


class _Making:
    """Makes nodes in front of another, under its name."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self._graph, self._before, self._count = graph, before, 0

    def __call__(self, operator: str, *inputs: ir.Value | None) -> ir.Value:
        scope = str(self._before.name).rpartition("/")[0]
        name = f"{scope}/{operator}_in_slices_{self._count}"
        self._count += 1
        node = ir.node(operator, inputs, name=name)
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
        self._graph.insert_before(self._before, node)
        return node.outputs[0]

    def constant(self, name: str, array: np.generic | np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
        tensor = ir.tensor(np.asarray(array), name=f"{self._before.name}/{name}")
        shape = ir.Shape(array.shape)
        value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self._graph.initializers[str(value.name)] = value
        return value


def _input(graph: ir.Graph, name: str, shape: tuple[int | str, ...]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def _plane(value: ir.Value, rows: str, width: str) -> tuple[int | str, ...]:
    return ("batch", _channels(value, 1), rows, width)


def _sides_of_latents(value: ir.Value) -> tuple[int | str, ...]:
    """The shape of features whose sides the tracer wrote as multiples of the latents'."""
    sides = [str(size.value) if isinstance(size, ir.SymbolicDim) else "" for size in (value.shape or ())[2:]]
    if [side.rpartition("*")[2] for side in sides] != ["height", "width"]:
        raise _refused(f"{value.name} of the shape {value.shape}, where multiples of the latents' sides are expected")
    return _plane(value, *sides)


def _channels(value: ir.Value, axis: int) -> int:
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise _refused(f"{value.name} of the shape {value.shape}, where a number of channels is expected")
    return size


def _refused(found: str) -> ExportError:
    return ExportError(f"found {found}, so it cannot be cut into slices; --no-parts leaves them out")


def _describe(part: ir.Model, **shapes: tuple[int | str, ...]) -> None:
    """Give outputs the shapes that a signature can say.

    Those of values inside were the whole's, and in a part an axis of the same name may have another size: backends
    that trust them share memory between the two.
    """
    for node in part.graph:
        for value in node.outputs:
            value.shape = None
    for value in part.graph.outputs:
        value.shape = ir.Shape(shapes[str(value.name)])

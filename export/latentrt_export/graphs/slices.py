"""Slices a decoder's graph, so that its last levels can be computed in bands of a few rows.

The parts are `head`, `attention` (a few queries at a time), `neck`, and the stages in their order (`slice.0`, …). A
stage ends with its one 3 × 3 convolution, because the norm behind it needs the statistics of the whole result.
`latentrt.decode.slices` runs them.

Before the last two levels everything is small, a sixteenth of the last level's rows and columns, and stays in one part.
The scores of attention are not small: they grow with the square of the image's area.

How the parts are compared with the whole graph:

* float32: by the pixels of a decode in slices. A sum over bands has another order than one over everything, which shows
  where a value is on the edge between two levels, so the bound is one level.
* int8: sometimes the last bit of a norm's sum decides which of two integers a value is rounded to, and later values
  depend on it, so that the rounding error differs, as it does on another backend. So two comparisons are made.
  Without the rounding of activations, the pixels must equal the whole graph's, as in float32. With it, each stage runs
  on the whole graph's values without optimisation; then a few values are one integer off. The RMS of that difference
  over the RMS of the output was 4e-3 (full size, random weights).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from latentrt.backends.session import Arrays, Session
from latentrt.bundle.manifest import GateResult, GraphRecord, Part, PartName, Precision
from latentrt.bundle.tensors import DType, TensorSpec
from latentrt.decode.slices import SlicedDecoder
from latentrt.errors import ExportError
from latentrt_export.gates.verify import Run, check_output
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.part_writer import PartWriter, StructureError
from latentrt_export.graphs.subgraph import extract_subgraph

__all__ = ["SliceWriter", "Stage", "find_stages", "slice_decoder"]

# The levels, counted from the last, whose convolutions become stages.
_LEVELS_IN_STAGES = 2
_ATTENTION = "decoder.mid_block.attentions.0"
_BEFORE_ATTENTION = "decoder.mid_block.resnets.0/Add"
_PIXEL_LEVELS = 1
_STAGE_RMS = 0.02
_ADVICE = "pass `parts=False`"
# Prefix of the temporary files whose activations are not rounded.
_UNROUNDED = "unrounded."
_DTYPES: dict[ir.DataType | None, DType] = {ir.DataType.FLOAT: "float32", ir.DataType.UINT8: "uint8"}


@dataclass(frozen=True)
class Stage:
    """The boundary of a stage, as names of the whole graph's values.

    Attributes:
        input, output: the value that the stage reads, and the value that it computes.
        residual: the value that it adds to its result; None for none.
        upsamples: whether it doubles the sides.
    """

    input: str
    output: str
    residual: str | None = None
    upsamples: bool = False

    @property
    def makes_pixels(self) -> bool:
        """Whether this is the last stage."""
        return self.output == "pixels"


def find_stages(model: ir.Model) -> list[Stage]:
    """Find the stages of a decoder's graph, in the order in which they run.

    Raises:
        StructureError: the graph does not have the structure of a decoder.
    """
    values = _values(model)
    stages = [*_find_stages(values)]
    for stage in stages:
        for name in (stage.input, stage.output, stage.residual):
            if name is not None and name not in values:
                raise _unsupported(f"no {name} in the decoder's graph")
    return stages


def slice_decoder(model: ir.Model) -> dict[PartName, ir.Model]:
    """Slice a decoder's finished graph into head, attention, neck and stages.

    Args:
        model: the whole; not modified. The parts share its tensors.

    Returns:
        The parts, in the order in which they run. Their inputs are float32.

    Raises:
        StructureError, ExportError: the graph does not have the structure of a decoder.
    """
    values, stages = _values(model), find_stages(model)
    parts = _split_before_stages(model, values, stages[0].input)
    for number, stage in enumerate(stages):
        parts[f"slice.{number}"] = _extract_stage(model, values, stage)
    return parts


def _values(model: ir.Model) -> dict[str, ir.Value]:
    return {str(value.name): value for node in model.graph for value in node.outputs}


def _find_stages(values: dict[str, ir.Value]) -> Iterator[Stage]:
    blocks = _count(values, r"decoder\.up_blocks\.(\d+)\.resnets\.0\.conv1/Conv")
    if not blocks or "pixels" not in values:
        raise _unsupported("no up_blocks and pixels in the decoder's graph")
    first = max(blocks - _LEVELS_IN_STAGES, 0)
    if first > 0:
        yield _upsampler(values, first - 1)
    for block in range(first, blocks):
        for resnet in range(_count(values, rf"decoder\.up_blocks\.{block}\.resnets\.(\d+)\.conv1/Conv")):
            yield from _resnet(values, f"decoder.up_blocks.{block}.resnets.{resnet}")
        if f"decoder.up_blocks.{block}.upsamplers.0.conv/Conv" in values:
            yield _upsampler(values, block)
    yield Stage(input=_input_of(values, "decoder.conv_norm_out/GroupNormalization"), output="pixels")


def _count(values: dict[str, ir.Value], pattern: str) -> int:
    return len({found[1] for name in values if (found := re.fullmatch(pattern, name))})


def _upsampler(values: dict[str, ir.Value], block: int) -> Stage:
    path = f"decoder.up_blocks.{block}.upsamplers.0"
    output = _skip_rounding(values, f"{path}.conv/Conv")
    return Stage(input=_input_of(values, f"{path}/Resize"), output=output, upsamples=True)


def _resnet(values: dict[str, ir.Value], path: str) -> Iterator[Stage]:
    residual = _input_of(values, f"{path}.norm1/GroupNormalization")
    hidden = _skip_rounding(values, f"{path}.conv1/Conv")
    yield Stage(input=residual, output=hidden)
    yield Stage(input=hidden, output=f"{path}/Add", residual=residual)


def _skip_rounding(values: dict[str, ir.Value], name: str) -> str:
    """Return the name of a value or, in an int8 graph, of its rounded form, which later nodes read."""
    if name not in values:
        raise _unsupported(f"no {name} in the decoder's graph")
    value = values[name]
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        readers = [use.node for use in value.uses()]
        if [node.op_type for node in readers] != [operator]:
            break
        value = readers[0].outputs[0]
    return str(value.name)


def _input_of(values: dict[str, ir.Value], name: str) -> str:
    node = values[name].producer() if name in values else None
    source = node.inputs[0] if node is not None else None
    if source is None:
        raise _unsupported(f"no {name} in the decoder's graph")
    return str(source.name)


def _split_before_stages(model: ir.Model, values: dict[str, ir.Value], last: str) -> dict[PartName, ir.Model]:
    """Split the graph before the stages into the parts around attention; without attention it is one part."""
    projections = {name: f"{_ATTENTION}.to_{name[0]}/Add" for name in ("queries", "keys", "values")}
    attended = f"{_ATTENTION}.to_out.0/Add"
    if not {*projections.values(), attended, _BEFORE_ATTENTION} <= values.keys():
        head = extract_subgraph(model, keep_inputs=["latents"], inputs={}, outputs={last: "result"})
        _declare_shapes(head, result=_plane_of_latents(values[last]))
        return {"head": head}
    width = _channels(values[attended], -1)
    all_tokens, some_tokens = ("batch", "tokens", width), ("batch", "queries", width)
    features = _plane(values[_BEFORE_ATTENTION], "height", "width")
    outputs = {_BEFORE_ATTENTION: "features", **{value: name for name, value in projections.items()}}
    head = extract_subgraph(model, keep_inputs=["latents"], inputs={}, outputs=outputs)
    _declare_shapes(head, features=features, **dict.fromkeys(projections, all_tokens))
    inputs = {
        value: TensorSpec(name, "float32", some_tokens if name == "queries" else all_tokens)
        for name, value in projections.items()
    }
    attention = extract_subgraph(model, keep_inputs=[], inputs=inputs, outputs={attended: "attended"})
    _declare_shapes(attention, attended=some_tokens)
    inputs = {
        attended: TensorSpec("attended", "float32", all_tokens),
        _BEFORE_ATTENTION: TensorSpec("features", "float32", features),
    }
    neck = extract_subgraph(model, keep_inputs=[], inputs=inputs, outputs={last: "result"})
    _declare_shapes(neck, result=_plane_of_latents(values[last]))
    return {"head": head, "attention": attention, "neck": neck}


def _extract_stage(model: ir.Model, values: dict[str, ir.Value], stage: Stage) -> ir.Model:
    inputs = {stage.input: TensorSpec("features", "float32", _plane(values[stage.input], "halo_rows", "width"))}
    if stage.residual is not None:
        shape = _plane(values[stage.residual], "rows", "width")
        inputs[stage.residual] = TensorSpec("residual", "float32", shape)
    name = "pixels" if stage.makes_pixels else "result"
    part = extract_subgraph(model, keep_inputs=[], inputs=inputs, outputs={stage.output: name})
    rows, width = ("2*rows", "2*width") if stage.upsamples else ("rows", "width")
    if stage.makes_pixels:
        _declare_shapes(part, pixels=("batch", rows, width, _channels(values["pixels"], -1)))
    else:
        _declare_shapes(part, result=_plane(values[stage.output], rows, width))
    norms = [node for node in part.graph if node.op_type == "GroupNormalization"]
    if len(norms) != (not stage.upsamples):
        raise _unsupported(f"{len(norms)} norms before {stage.output}")
    for norm in norms:
        _add_statistics(part.graph, norm)
    _add_halo(part.graph, stage)
    return part


def _add_statistics(graph: ir.Graph, norm: ir.Node) -> None:
    """Replace a group norm by a scale and a shift per channel, computed from the inputs `mean` and `variance`.

    Both are float32 [B, G] and of the whole feature map; they cannot be computed from a band.
    """
    groups = norm.attributes["num_groups"].as_int()
    mean, variance = (_add_input(graph, name, ("batch", groups)) for name in ("mean", "variance"))
    features, gamma, beta = norm.inputs
    build = _Builder(graph, norm)
    epsilon = build.constant("epsilon", np.float32(norm.attributes["epsilon"].as_float()))
    grouped, last = build.constant("grouped", np.array([1, groups, -1])), build.constant("last", np.array([2]))
    channels = build.constant("channels", np.array([0, -1, 1, 1]))
    deviation = build("Unsqueeze", build("Sqrt", build("Add", variance, epsilon)), last)  # (B, G, 1)
    scale = build("Div", build("Reshape", gamma, grouped), deviation)  # (B, G, C / G)
    moved = build("Mul", build("Unsqueeze", mean, last), scale)
    shift = build("Sub", build("Reshape", beta, grouped), moved)
    scaled = build("Mul", features, build("Reshape", scale, channels))
    normed = build("Add", scaled, build("Reshape", shift, channels))
    ir.convenience.replace_all_uses_with(norm.outputs[0], normed)
    graph.remove(norm, safe=True)


def _add_halo(graph: ir.Graph, stage: Stage) -> None:
    """Make the convolution read one row above and one below the band from its input, instead of padding with zeros.

    Outside of the image, values are zero behind the activation, not before it, so the input `inside` marks the rows
    that are inside. Nearest-neighbour upsampling makes four rows of the halo's two, of which the outer two are dropped.
    """
    convolutions = [
        node for node in graph if node.op_type == "Conv" and list(node.attributes["kernel_shape"].as_ints()) == [3, 3]
    ]
    if [list(node.attributes["pads"].as_ints()) for node in convolutions] != [[1, 1, 1, 1]]:
        raise _unsupported(f"more or less than one padded 3 × 3 convolution before {stage.output}")
    (convolution,) = convolutions
    convolution.attributes["pads"] = ir.AttrInt64s("pads", [0, 1, 0, 1])
    reader = _first_reader(convolution)
    build = _Builder(graph, reader)
    if stage.upsamples:
        first, end, axis = (
            build.constant(name, np.array([at])) for name, at in (("first", 1), ("end", -1), ("axis", 2))
        )
        rows = build("Slice", reader.inputs[0], first, end, axis)
    else:
        rows = build("Mul", reader.inputs[0], _add_input(graph, "inside", ("batch", 1, "halo_rows", 1)))
    reader.replace_input_with(0, rows)


def _first_reader(convolution: ir.Node) -> ir.Node:
    """Return the node that reads a convolution's input: itself or, in an int8 graph, the QuantizeLinear before it.

    Backends multiply integers only if no other node is between the two.
    """
    node = convolution
    for operator in ("DequantizeLinear", "QuantizeLinear"):
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is None or source.op_type != operator:
            break
        node = source
    return node


class _Builder:
    """A builder that inserts nodes before a given node and names them after its scope."""

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


def _add_input(graph: ir.Graph, name: str, shape: tuple[int | str, ...]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def _plane(value: ir.Value, rows: str, width: str) -> tuple[int | str, ...]:
    return ("batch", _channels(value, 1), rows, width)


def _plane_of_latents(value: ir.Value) -> tuple[int | str, ...]:
    """Return the shape of features whose sides the tracer wrote as multiples of the latents'."""
    sides = [str(size.value) if isinstance(size, ir.SymbolicDim) else "" for size in (value.shape or ())[2:]]
    if [side.rpartition("*")[2] for side in sides] != ["height", "width"]:
        raise _unsupported(f"{value.name} of shape {value.shape}, expected multiples of the latents' sides")
    return _plane(value, *sides)


def _channels(value: ir.Value, axis: int) -> int:
    size = value.shape[axis] if value.shape is not None else None
    if not isinstance(size, int):
        raise _unsupported(f"{value.name} of shape {value.shape}, expected a fixed number of channels")
    return size


def _unsupported(found: str) -> StructureError:
    return StructureError(f"the decoder cannot be sliced (got {found})")


def _declare_shapes(part: ir.Model, **shapes: tuple[int | str, ...]) -> None:
    """Set the shapes of a part's outputs, and forget those of the values inside.

    The shapes inside are those of the whole graph. In a part, an axis of the same name may have another size, and
    backends that rely on the shapes would reuse memory of the wrong size.
    """
    for node in part.graph:
        for value in node.outputs:
            value.shape = None
    for value in part.graph.outputs:
        value.shape = ir.Shape(shapes[str(value.name)])


# Writing and comparing


@dataclass(kw_only=True)
class SliceWriter(PartWriter):
    """A writer that slices a decoder's float32 or int8 graph.

    Attributes:
        inputs, outputs: the whole decoder's.
    """

    drawback: ClassVar[str] = "on a CPU the decoder takes several times the memory, which grows with the image's area"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def _write(self, model: ir.Model, whole: GraphRecord, precision: Precision, runs: Iterable[Run]) -> None:
        self.notify(f"checking the slices of the {precision} graph")
        try:
            parts, runs = slice_decoder(model), tuple(runs)
        except StructureError:
            raise
        except ExportError as error:
            raise _unsupported(str(error)) from error
        for name, part in parts.items():
            file = self.file_name(whole, name)
            ir.save(part, self.folder / file)
            record = GraphRecord(file=f"{self.component}/{file}", opset=whole.opset, nodes=len(part.graph))
            inputs, outputs = _describe_values(part.graph.inputs), _describe_values(part.graph.outputs)
            self.parts[name] = Part(inputs=inputs, outputs=outputs, graphs={precision: record})
        last = [*parts][-1]  # computes the pixels, so its record has the results of all parts together
        if precision == "float32":
            gates = {last: _compare_pixels("float32 graph", self.open(), runs)}
        else:
            gates = self._compare_stages(model, whole, runs)
            gates[last] = (*gates.get(last, ()), *self._compare_unrounded(model, parts, whole, runs))
        for name, gate in gates.items():
            self.parts[name] = _set_gate(self.parts[name], precision, gate)

    def open(self, prefix: str = "", *, optimize: bool = True) -> SlicedDecoder:
        """Open the written parts as the runtime does; `prefix` selects other files of the same parts."""
        return SlicedDecoder(
            self.inputs,
            self.outputs,
            self.parts,
            lambda name: self._open_part(name, prefix, optimize=optimize),
            lambda name: None,
        )

    def _compare_stages(
        self, model: ir.Model, whole: GraphRecord, runs: Iterable[Run]
    ) -> dict[PartName, tuple[GateResult, ...]]:
        """Compare each stage of an int8 decoder, and `head` for all parts before it, with the whole graph's values."""
        stages, decoder = find_stages(model), self.open(optimize=False)
        graph = _open_with_values(model, self.folder / f"values.{Path(whole.file).name}", stages)
        gates: dict[PartName, list[GateResult]] = {}
        for run in runs:
            for name, result in _run_stages(run.feeds, graph.run(run.feeds), stages, decoder):
                gates.setdefault(name, []).append(result)
        return {name: tuple(results) for name, results in gates.items()}

    def _compare_unrounded(
        self, model: ir.Model, parts: dict[PartName, ir.Model], whole: GraphRecord, runs: Iterable[Run]
    ) -> tuple[GateResult, ...]:
        files = {self.file_name(whole, name): part for name, part in parts.items()} | {Path(whole.file).name: model}
        paths = {file: self.folder / f"{_UNROUNDED}{file}" for file in files}
        try:
            for file, each in files.items():
                ir.save(_remove_rounding(each), paths[file])
            graph = Graph(paths[Path(whole.file).name])
            expected = [Run(run.feeds, graph.run(run.feeds)) for run in runs]
            del graph
            return _compare_pixels("int8 graph without its rounding", self.open(_UNROUNDED), expected)
        finally:
            for path in paths.values():
                path.unlink(missing_ok=True)

    def _open_part(self, name: PartName, prefix: str, *, optimize: bool) -> _OpenPart:
        (record,) = self.parts[name].graphs.values()
        graph = Graph(self.folder / f"{prefix}{Path(record.file).name}", optimize=optimize)
        return _OpenPart(self.parts[name].inputs, self.parts[name].outputs, graph)


@dataclass(frozen=True)
class _OpenPart(Session):
    """A part on ONNX Runtime."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    graph: Graph

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return self.graph.run(feeds)


def _describe_values(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(str(value.name), _DTYPES[value.dtype], tuple(_size(size) for size in value.shape or ()))
        for value in values
    )


def _size(size: int | ir.SymbolicDim) -> int | str:
    return size if isinstance(size, int) else str(size.value)


def _set_gate(part: Part, precision: Precision, gate: tuple[GateResult, ...]) -> Part:
    record = part.graphs[precision]
    compared = GraphRecord(file=record.file, opset=record.opset, nodes=record.nodes, gate=gate)
    return Part(inputs=part.inputs, outputs=part.outputs, graphs={precision: compared})


def _compare_pixels(graph: str, decoder: SlicedDecoder, runs: Iterable[Run]) -> tuple[GateResult, ...]:
    return tuple(
        check_output(
            f"the {graph} and its slices",
            "pixels",
            run.outputs["pixels"],
            decoder.run(run.feeds)["pixels"],
            "levels",
            _PIXEL_LEVELS,
            feeds=run.feeds,
            reference_name="its own",
            advice=_ADVICE,
        )
        for run in runs
    )


def _run_stages(
    feeds: Arrays, values: Arrays, stages: Sequence[Stage], decoder: SlicedDecoder
) -> Iterator[tuple[PartName, GateResult]]:
    """Run each stage on the whole graph's values and compare its output with theirs."""
    first = stages[0].input
    yield "head", _compare_stage(first, values[first], decoder.before_stages(feeds["latents"]), feeds)
    for number, stage in enumerate(stages):
        residual = values[stage.residual].copy() if stage.residual is not None else None
        found = decoder.run_stage(number, feeds["latents"].shape, values[stage.input].copy(), residual)
        yield f"slice.{number}", _compare_stage(stage.output, values[stage.output], found, feeds)


def _compare_stage(output: str, expected: NDArray[Any], found: NDArray[Any], feeds: Arrays) -> GateResult:
    return check_output(
        "the int8 graph and its slices",
        output,
        expected,
        found,
        "rms",
        _STAGE_RMS,
        feeds=feeds,
        reference_name="its own",
        advice=_ADVICE,
    )


def _open_with_values(model: ir.Model, path: Path, stages: Iterable[Stage]) -> Graph:
    """Open the whole graph with the inputs, residuals and outputs of the stages as added outputs.

    Args:
        path: a temporary file in the weights' folder; removed again.
    """
    whole = model.clone()
    values = _values(whole)
    wanted = {name for stage in stages for name in (stage.input, stage.output, stage.residual) if name is not None}
    present = {str(value.name) for value in whole.graph.outputs}
    whole.graph.outputs.extend(values[name] for name in sorted(wanted - present))
    ir.save(whole, path)
    try:
        return Graph(path, optimize=False)
    finally:
        path.unlink(missing_ok=True)


def _remove_rounding(model: ir.Model) -> ir.Model:
    """Copy a graph without the rounding of its activations."""
    model = model.clone()
    for node in tuple(model.graph):
        source = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if source is not None:
            for use in tuple(node.outputs[0].uses()):
                _read_unrounded(model.graph, use.node.outputs[0], source)
    RemoveUnusedNodesPass()(model)
    return model


def _read_unrounded(graph: ir.Graph, rounded: ir.Value, source: ir.Value) -> None:
    if rounded.is_graph_output():
        index = [*graph.outputs].index(rounded)
        rounded.name, source.name, source.shape = f"{rounded.name}/rounded", rounded.name, rounded.shape
        graph.outputs[index] = source
    ir.convenience.replace_all_uses_with(rounded, source)

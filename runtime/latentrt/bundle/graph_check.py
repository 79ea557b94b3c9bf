"""Checks a graph of a bundle before a backend parses it.

ONNX Runtime, OpenVINO and TensorRT open whatever file a graph names as the place of its weights, and allocate whatever
its shapes ask for. So a graph is read here first (`latentrt.bundle.onnx_graph`), and it runs only if

- it is an ONNX graph as the exporter writes it: its IR version, its operator sets and operators
  (`latentrt.bundle.graph_shapes.OPERATORS`) with their attributes (`latentrt.bundle.graph_attributes`), no function, no
  subgraph;
- its inputs and outputs are those of the manifest, and every tensor has the type that the graph declares for it;
- every weight is in the component's own pinned file, inside its size, of a type that such a file may have, and no two
  overlap;
- its constants are small, and one image of 64 × 64 latents needs at most the memory of its role, plus 8 bytes for each
  byte of weights (float32 copies of int8 weights, and their transposes);
- no index can lie outside its data, and no whole number is divided by 0 (`latentrt.bundle.graph_ranges`).

The last two depend on the sizes of the inputs. So backends check them again for each set of sizes before they run on
it, where the memory may grow no faster than that of the exporter's graphs does (`CheckedGraph.check_sizes`).

The exporter runs the same check, so that a graph it could not run again fails while it is exported.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from latentrt.bundle.graph_attributes import check_attributes
from latentrt.bundle.graph_ranges import Range, check_ranges
from latentrt.bundle.graph_shapes import OPERATORS, Shape, Values, infer_values, peak_bytes
from latentrt.bundle.graph_types import infer_types
from latentrt.bundle.manifest import Component, GraphRecord, Limits, Manifest, Part, Role, TokenizerRecord
from latentrt.bundle.onnx_graph import GraphFormatError, OnnxGraph, Tensor, TensorType, read_graph
from latentrt.bundle.onnx_types import CODES, WEIGHT_DTYPES
from latentrt.bundle.printable import printable, quote
from latentrt.bundle.tensors import TensorSpec, axis_sizes, sized
from latentrt.errors import GraphError

__all__ = [
    "CheckedGraph",
    "ComponentGraph",
    "check_graph",
    "find_graphs",
    "find_ranges",
    "graphs_by_file",
]

_IR_VERSION = 10
_OPSETS = {"": 21, "com.microsoft": 1}
_SUFFIX = ".onnx"
# The largest constant of an exported graph is a causal mask of 6 kB.
_MAX_CONSTANT_BYTES = 4 << 20
_EXPORT_AGAIN = (
    "A graph runs only if latentrt's exporter can have written it; export the checkpoint again: latentrt export "
    "CHECKPOINT BUNDLE"
)
_DECIMAL = re.compile("0|[1-9][0-9]{0,17}", re.ASCII)

# Sizes of named axes for the memory bound: one image of 512 × 512 pixels of an autoencoder that halves three times, a
# multiple of 64 latents as no denoiser needs a larger one.
_SIDE, _PIXELS, _PROMPT_TOKENS = 64, 512, 77
_SIZES = {
    **dict.fromkeys(("batch", "chunks", "evaluations", "images"), 1),
    **dict.fromkeys(("height", "width", "rows", "queries", "timesteps"), _SIDE),
    **dict.fromkeys(("pixel_height", "pixel_width"), _PIXELS),
    "halo_rows": _SIDE + 2,
}
# Deep features (DeepCache) are smaller by a power of two, which a graph does not say.
_DEEP_AXES, _DEEP_SIDES = ("deep_height", "deep_width"), (_SIDE // 2, _SIDE // 4, _SIDE // 8)
# Axes of which the memory is a quadratic function: that of the scores of self-attention.
_SQUARED = ("height", "width", "pixel_height", "pixel_width")
# The memory of one image counts as this much at least: small graphs grow by constants, and by rounding.
_FREE_BYTES = 64 << 20
# What a backend calculates from the weights while it loads a graph, and keeps: bytes as float32, and transposed.
_WEIGHTS_FACTOR = 8
# The scores of self-attention at that size take 0.5 GiB in Stable Diffusion 1 (8 heads), and are held twice; the
# features of a decoder take 0.25 GiB each. A graph made to exhaust the memory is far beyond.
_MAX_BYTES: Mapping[Role, int] = {
    "denoiser": 8 << 30,
    "decoder": 8 << 30,
    "encoder": 8 << 30,
    "preview-decoder": 8 << 30,
    "text-encoder": 2 << 30,
    "image-encoder": 2 << 30,
    "classifier": 2 << 30,
    "depth-estimator": 2 << 30,
}


@dataclass(frozen=True, kw_only=True)
class ComponentGraph:
    """A graph that the manifest names, and the parts of the manifest that it must agree with.

    Attributes:
        file, weights: names of the two files in the bundle.
        weights_bytes: the size of the weights file.
        opset: the version of the ONNX operators.
        ranges: the range of each input of whole numbers that has one.
    """

    file: str
    weights: str
    weights_bytes: int
    opset: int
    role: Role
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    ranges: Mapping[str, Range]


def find_ranges(limits: Limits, tokenizer: TokenizerRecord | None) -> dict[str, Range]:
    """Return the range of the whole numbers that each source may feed; requests and tokenizers keep to it.

    Args:
        limits: of the bundle.
        tokenizer: of the component; None where it takes no tokens.
    """
    return {
        "option:clip_skip": (0, limits.max_clip_skip),
        "noise-level": (0, limits.max_noise_level),
        **({"tokens": (0, tokenizer.rows - 1)} if tokenizer is not None else {}),
    }


def find_graphs(component: Component, weights_bytes: int, ranges: Mapping[str, Range]) -> list[ComponentGraph]:
    """Return the graphs of a component and its parts.

    Args:
        weights_bytes: size of its weights file.
        ranges: of the whole numbers from each source (`find_ranges`).
    """
    ranges_by_input = {spec.name: ranges[spec.source] for spec in component.inputs if spec.source in ranges}

    def describe(signature: Component | Part, record: GraphRecord) -> ComponentGraph:
        return ComponentGraph(
            file=record.file,
            weights=component.weights.file,
            weights_bytes=weights_bytes,
            opset=record.opset,
            role=component.role,
            inputs=signature.inputs,
            outputs=signature.outputs,
            ranges=ranges_by_input,
        )

    signatures: list[Component | Part] = [component, *component.parts.values()]
    return [describe(each, record) for each in signatures for record in each.graphs.values()]


def graphs_by_file(manifest: Manifest) -> dict[str, ComponentGraph]:
    """Return the graphs of a bundle by their files, of which a manifest names each once."""
    found: dict[str, ComponentGraph] = {}
    for name, component in manifest.components.items():
        ranges = find_ranges(manifest.limits, manifest.tokenizers.get(name))
        for graph in find_graphs(component, manifest.files[component.weights.file].size, ranges):
            found[graph.file] = graph
    return found


class CheckedGraph:
    """A graph that passed `check_graph`.

    Attributes:
        data: the content of its file.
        named_inputs: the inputs whose shapes tell the size of every named axis.
        external_names: the names of the tensors whose values are in the weights file.
    """

    def __init__(
        self, data: bytes, graph: OnnxGraph, types: Mapping[str, int], expected: ComponentGraph, peak: int
    ) -> None:
        self.data = data
        self._graph, self._types, self._expected, self._peak = graph, types, expected, peak
        self.external_names = {name for name, each in graph.initializers.items() if each.external is not None}
        places: dict[str, tuple[str, int]] = {}
        for spec in expected.inputs:
            for index, axis in enumerate(spec.shape):
                if isinstance(axis, str):
                    places.setdefault(axis, (spec.name, index))
        self._places = tuple(places.values())
        self.named_inputs = tuple(dict.fromkeys(name for name, _ in self._places))
        self._passed: set[tuple[int, ...]] = set()

    def check_sizes(self, shapes: Mapping[str, Shape]) -> None:
        """Check the graph for the sizes of a run, once for each set of sizes.

        Memory may grow linearly with every named axis, and with the square of an image's area.

        Args:
            shapes: of `named_inputs` at least.

        Raises:
            GraphError: it needs more, an index may lie outside its data, or an output has another shape than the
                manifest says.
        """
        key = tuple([shapes[name][axis] for name, axis in self._places])
        if key in self._passed:
            return
        expected = self._expected
        sizes = axis_sizes([spec for spec in expected.inputs if spec.name in self.named_inputs], shapes)
        try:
            found, values = infer_values(self._graph, sizes)
            _check_declared_types(self._graph, self._types, found)
            for spec in expected.outputs:
                if not _agrees(wanted := _resolve(spec, sizes), found[spec.name]):
                    raise GraphFormatError(
                        f"makes {spec.name} of shape {list(found[spec.name])}, expected {list(wanted)}"
                    )
            check_ranges(self._graph, self._types, found, values, expected.ranges)
            allowed = 2 * max(self._peak, _FREE_BYTES) * _growth(sizes, expected.role)
            needed, node = peak_bytes(self._graph, self._types, found)
            if needed > allowed:
                named = ", ".join(f"{axis} {size}" for axis, size in sizes.items())
                raise GraphFormatError(
                    f"needs {needed / 2**30:,.1f} GiB at node {quote(node)} for {named}, expected at most "
                    f"{allowed / 2**30:,.1f} GiB, as it needs {self._peak / 2**30:,.2f} GiB for one image of "
                    f"{_PIXELS} × {_PIXELS} pixels"
                )
        except GraphFormatError as error:
            raise _refuse(expected.file, error, _EXPORT_AGAIN) from None
        self._passed.add(key)


def check_graph(data: bytes, expected: ComponentGraph, *, remedy: str = _EXPORT_AGAIN) -> CheckedGraph:
    """Reject a graph that is not one of the exporter's, or does not agree with the manifest.

    Args:
        data: the content of the file.
        remedy: the end of the message.

    Raises:
        GraphError: the message names the file, the node or tensor, and the value expected.
    """
    try:
        if not expected.file.endswith(_SUFFIX):
            raise GraphFormatError(f"is named as an ONNX graph, expected a name that ends in {_SUFFIX}")
        graph = read_graph(data)
        _check_versions(graph, expected.opset)
        _check_operators(graph)
        _check_names(graph)
        _check_signature("input", graph.inputs, expected.inputs)
        _check_signature("output", graph.outputs, expected.outputs)
        _check_tensors(graph, expected)
        types = infer_types(graph)
        shapes, values = _infer_reference_values(graph, _reference_sizes(expected.role))
        _check_declared_types(graph, types, shapes)
        check_ranges(graph, types, shapes, values, expected.ranges)
        return CheckedGraph(data, graph, types, expected, _check_memory(graph, types, shapes, expected))
    except GraphFormatError as error:
        raise _refuse(expected.file, error, remedy) from None


def _refuse(file: str, error: GraphFormatError, remedy: str) -> GraphError:
    return GraphError(f"{printable(file)} {error}. {remedy}")


def _check_versions(graph: OnnxGraph, opset: int) -> None:
    if graph.ir_version != _IR_VERSION:
        raise GraphFormatError(f"is of IR version {graph.ir_version}, expected {_IR_VERSION}")
    for domain, version in graph.opsets.items():
        if _OPSETS.get(domain) != version:
            known = ", ".join(f"{name or 'ai.onnx'} {number}" for name, number in _OPSETS.items())
            raise GraphFormatError(f"uses the operators of {quote(domain)} {version}, expected {known}")
    if graph.opsets.get("") != opset:
        raise GraphFormatError(f"has no operators of ONNX {opset}, expected those, as the manifest says")


def _check_operators(graph: OnnxGraph) -> None:
    for node in graph.nodes:
        if (node.domain, node.op_type) not in OPERATORS:
            domain = printable(node.domain) or "ai.onnx"
            raise GraphFormatError(
                f"has node {quote(node.name)} with the operator {printable(node.op_type)} of {domain}, which is "
                "not among those that the exporter writes"
            )
        if node.domain not in graph.opsets:
            raise GraphFormatError(f"has node {quote(node.name)} of {node.domain}, which it does not import")
        check_attributes(node)


def _check_names(graph: OnnxGraph) -> None:
    """Check that every tensor is made once, before it is read: parsers interpret anything else differently."""
    if twice := graph.inputs.keys() & graph.initializers.keys():
        raise GraphFormatError(f"has {quote(min(twice))} as an input and as a constant, expected one of the two")
    made = {*graph.inputs, *graph.initializers}
    for node in graph.nodes:
        for name in node.inputs:
            if name and name not in made:
                raise GraphFormatError(
                    f"has node {quote(node.name)} that reads {quote(name)}, which nothing before it makes"
                )
        for name in node.outputs:
            if not name or name in made:
                raise GraphFormatError(
                    f"has node {quote(node.name)} that makes {quote(name)}, expected a name of its own"
                )
            made.add(name)
    if missing := graph.outputs.keys() - made:
        raise GraphFormatError(f"makes no {quote(min(missing))}, which is one of its outputs")


def _check_signature(kind: str, found: Mapping[str, TensorType], specs: tuple[TensorSpec, ...]) -> None:
    if list(found) != [spec.name for spec in specs]:
        raise GraphFormatError(
            f"has the {kind}s {[printable(name) for name in found]}, expected {[spec.name for spec in specs]} as in "
            "the manifest"
        )
    for spec in specs:
        made = found[spec.name]
        if made.dtype != CODES[spec.dtype] or made.shape != spec.shape:
            raise GraphFormatError(
                f"has the {kind} {spec.name} of data type {made.dtype} and shape {made.shape}, expected {spec} as in "
                "the manifest"
            )


def _check_tensors(graph: OnnxGraph, expected: ComponentGraph) -> None:
    """Check that constants are small, and that weights are in the component's file and do not overlap."""
    place = PurePosixPath(expected.weights)
    folder = PurePosixPath(expected.file).parent
    location = str(place.relative_to(folder)) if place.is_relative_to(folder) else None
    constants, spans = 0, list[tuple[int, int, str]]()
    for tensor in graph.initializers.values():
        if tensor.external is None:
            constants += tensor.nbytes
        else:
            spans.append(_find_span(tensor, location, expected))
    if constants > _MAX_CONSTANT_BYTES:
        raise GraphFormatError(f"has {constants:,} bytes of constants, expected at most {_MAX_CONSTANT_BYTES:,}")
    end, before = 0, ""
    for first, last, name in sorted(spans):
        if first < end:
            raise GraphFormatError(f"has {quote(name)} and {quote(before)} in the same bytes of the weights")
        end, before = last, name


def _find_span(tensor: Tensor, location: str | None, expected: ComponentGraph) -> tuple[int, int, str]:
    """Return the first byte of a weight in its file, and the one behind it.

    Raises:
        GraphFormatError: it is not in the component's weights file.
    """
    external, owner = tensor.external, quote(tensor.name)
    assert external is not None, "the tensor is external"
    if external.location != location:
        raise GraphFormatError(
            f"has {owner} in the file {quote(external.location)}, expected '{location}', the component's "
            "weights, and no other"
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        raise GraphFormatError(f"has {owner} of data type {tensor.dtype}, expected one of {sorted(WEIGHT_DTYPES)}")
    for key, digits in (("offset", external.offset), ("length", external.length)):
        if not _DECIMAL.fullmatch(digits):
            raise GraphFormatError(f"has {owner} at the {key} {quote(digits)}, expected a decimal number")
    offset, length = int(external.offset), int(external.length)
    if length != tensor.nbytes or length == 0:
        raise GraphFormatError(
            f"has {owner} with {length:,} bytes, expected {tensor.nbytes:,} for its shape {list(tensor.shape)}, and "
            "more than none"
        )
    if offset + length > expected.weights_bytes:
        raise GraphFormatError(
            f"has {owner} up to byte {offset + length:,} of {expected.weights}, expected at most "
            f"{expected.weights_bytes:,}, the size of that file"
        )
    return offset, offset + length, tensor.name


def _check_declared_types(graph: OnnxGraph, types: Mapping[str, int], shapes: Mapping[str, Shape]) -> None:
    """Check that every tensor has the element type and the sizes that the graph declares for it."""
    for name, declared in {**graph.value_info, **graph.outputs}.items():
        if name in types and declared.dtype != types[name]:
            raise GraphFormatError(
                f"declares {quote(name)} as data type {declared.dtype}, but its nodes make {types[name]}"
            )
        if name in shapes and declared.shape is not None and not _agrees(declared.shape, shapes[name]):
            raise GraphFormatError(
                f"declares {quote(name)} as {list(declared.shape)}, but its nodes make {list(shapes[name])}"
            )


def _check_memory(
    graph: OnnxGraph, types: Mapping[str, int], shapes: Mapping[str, Shape], expected: ComponentGraph
) -> int:
    """Return the most memory that a graph needs for one image, in bytes."""
    needed, node = peak_bytes(graph, types, shapes)
    most = _MAX_BYTES[expected.role] + _WEIGHTS_FACTOR * expected.weights_bytes
    if needed > most:
        raise GraphFormatError(
            f"needs {needed / 2**30:,.1f} GiB at node {quote(node)} for one image of {_PIXELS} × {_PIXELS} pixels, "
            f"expected at most {most / 2**30:,.1f} GiB of a {expected.role} with {expected.weights_bytes:,} bytes of "
            "weights"
        )
    return needed


def _reference_sizes(role: Role) -> dict[str, int]:
    return {**_SIZES, "tokens": _SIDE * _SIDE if role == "decoder" else _PROMPT_TOKENS}


def _growth(sizes: Mapping[str, int], role: Role) -> float:
    """Return how many times more memory a graph of the exporter needs at most for these sizes than for one image."""
    growth = 1.0
    for axis, size in _reference_sizes(role).items():
        growth *= max(sizes.get(axis, 1) / size, 1.0) ** (2 if axis in _SQUARED else 1)
    return growth


def _infer_reference_values(graph: OnnxGraph, sizes: Mapping[str, int]) -> tuple[dict[str, Shape], dict[str, Values]]:
    """Infer shapes and values for one image, with the first side of deep features that fits."""
    named = {axis for spec in graph.inputs.values() for axis in spec.shape or ()}
    *others, last = _DEEP_SIDES if not named.isdisjoint(_DEEP_AXES) else (_SIDE,)
    for side in others:
        with contextlib.suppress(GraphFormatError):
            return infer_values(graph, {**sizes, **dict.fromkeys(_DEEP_AXES, side)})
    return infer_values(graph, {**sizes, **dict.fromkeys(_DEEP_AXES, last)})


def _resolve(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int | str, ...]:
    """Return a tensor's shape with the sizes of the named axes that are known: a part may make axes of its own."""
    known = (isinstance(axis, int) or axis.rpartition("*")[2] in sizes for axis in spec.shape)
    return tuple(
        sized(TensorSpec(spec.name, spec.dtype, (axis,)), sizes)[0] if each else axis
        for axis, each in zip(spec.shape, known, strict=True)
    )


def _agrees(declared: tuple[int | str | None, ...], shape: Shape) -> bool:
    """Return whether a shape has the declared rank, and the declared size on every axis whose size is a number."""
    return len(declared) == len(shape) and all(
        size == each for each, size in zip(declared, shape, strict=True) if isinstance(each, int)
    )

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Component
from latentrt.bundle.onnx_graph import MAX_GRAPH_BYTES
from latentrt.bundle.tensors import TensorSpec
from latentrt.bundle.weights import map_weights
from latentrt.errors import BuildError
from latentrt_engines.library import Library, load_library
from latentrt_engines.network import Log, check_network, make_log, parse_network
from latentrt_engines.profiles import _MAX_RANKED
from tests.exported import Exported

Weights = Mapping[str, NDArray[Any]]


@pytest.fixture(scope="module")
def rtx() -> Library:
    return load_library("tensorrt_rtx")


def read(bundle: Bundle, component: str) -> tuple[bytes, dict[str, NDArray[Any]]]:
    graph, weights = bundle.component_files(component, bundle.manifest.precision)
    return bundle.read(graph, MAX_GRAPH_BYTES), map_weights(bundle.path(weights))


class Parsed:
    """A network, and the objects that have to outlive it."""

    def __init__(self, rtx: Library, component: str, graph: bytes, weights: Weights) -> None:
        self.log, self._logger = make_log(rtx)
        self._builder, self._weights = rtx.module.Builder(self._logger), weights
        self.network, self._parser = parse_network(rtx, self._logger, self._builder, component, graph, weights)


def refusal(rtx: Library, graph: bytes, weights: Weights) -> str:
    with pytest.raises(BuildError) as refused:
        Parsed(rtx, "unet", graph, weights)
    return str(refused.value)


def edit_graph(graph: bytes, edit: Callable[[onnx.ModelProto], None]) -> bytes:
    """Edit a graph; its weights stay external."""
    model = onnx.load_model_from_string(graph)
    edit(model)
    data: bytes = model.SerializeToString()
    return data


# Parsing


@pytest.mark.parametrize("name", ["sd1", "sd2", "sample"])
def test_every_graph_is_parsed_and_matches_the_manifest(
    rtx: Library, sample: Bundle, request: pytest.FixtureRequest, name: str
) -> None:
    bundle = sample if name == "sample" else Bundle.open(request.getfixturevalue(name).bundle)
    for component, record in bundle.manifest.components.items():
        parsed = Parsed(rtx, component, *read(bundle, component))
        assert parsed.network.num_layers > 0
        assert parsed.log.errors == []
        check_network(rtx, parsed.network, component, record)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("down_blocks.0.resnets.0.conv1/Conv", "down_blocks.0.resnets.0.conv1"),
        ("/Shape", "the component's root"),
    ],
)
def test_an_unknown_op_is_named_with_its_node_and_module(rtx: Library, sd1: Exported, name: str, module: str) -> None:
    graph, weights = read(Bundle.open(sd1.bundle), "unet")
    numbers: list[int] = []

    def break_it(model: onnx.ModelProto) -> None:
        number, node = next(each for each in enumerate(model.graph.node) if each[1].name == name)
        node.op_type = "Frobnicate"
        numbers.append(number)

    message = refusal(rtx, edit_graph(graph, break_it), weights)
    assert message.startswith(f"unet: {rtx}")
    assert f"node {name} (number {numbers[0]}), op Frobnicate, module {module}: " in message
    assert message.count("Frobnicate") <= 3, "the library's description is not repeated"
    assert "\n" not in message


@pytest.mark.parametrize("graph", [b"no graph at all", b"\xff" * 1000])
def test_invalid_graphs(rtx: Library, sd1: Exported, graph: bytes) -> None:
    _, weights = read(Bundle.open(sd1.bundle), "unet")
    for given in ({}, weights):
        assert refusal(rtx, graph, given).startswith(f"unet: {rtx} cannot parse the graph")


def test_an_empty_graph(rtx: Library, record: Component) -> None:
    """It is valid protobuf and parsed without an error, but has none of the manifest's inputs."""
    empty = Parsed(rtx, "unet", b"\x08\x07", {})
    assert "inputs []" in mismatch(rtx, empty, record)


def test_a_truncated_graph(rtx: Library, sd1: Exported) -> None:
    graph, weights = read(Bundle.open(sd1.bundle), "unet")
    assert "cannot parse the graph" in refusal(rtx, graph[: len(graph) // 2], weights)


def test_missing_weights(rtx: Library, sd1: Exported) -> None:
    """The library would look for a file next to the graph, but has only the graph's bytes."""
    graph, weights = read(Bundle.open(sd1.bundle), "unet")
    gone = "conv_in.weight"
    message = refusal(rtx, graph, {name: array for name, array in weights.items() if name != gone})
    assert "cannot parse the graph" in message
    assert gone in message


def test_weights_that_the_graph_lacks(rtx: Library, sd1: Exported) -> None:
    graph, weights = read(Bundle.open(sd1.bundle), "unet")
    message = refusal(rtx, graph, {**weights, "conv_in.weigth": np.ones(4, np.float32)})
    assert message.startswith("unet: ")
    assert "conv_in.weigth with 16 bytes" in message


@pytest.mark.parametrize("change", [lambda array: array[:-1], lambda array: array.astype(np.float16)])
def test_weights_of_another_size(rtx: Library, sd1: Exported, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    graph, weights = read(Bundle.open(sd1.bundle), "unet")
    weights["conv_in.weight"] = np.ascontiguousarray(change(weights["conv_in.weight"]))
    message = refusal(rtx, graph, weights)
    assert message.startswith("unet: ")
    assert f"conv_in.weight with {weights['conv_in.weight'].nbytes:,} bytes" in message


# Networks and the manifest


@pytest.fixture(scope="module")
def unet(rtx: Library, sd1: Exported) -> Parsed:
    return Parsed(rtx, "unet", *read(Bundle.open(sd1.bundle), "unet"))


@pytest.fixture
def record(sd1: Exported) -> Component:
    return Bundle.open(sd1.bundle).manifest.components["unet"]


def with_input(record: Component, index: int, **changes: Any) -> Component:
    specs = list(record.inputs)
    specs[index] = msgspec.structs.replace(specs[index], **changes)
    return msgspec.structs.replace(record, inputs=tuple(specs))


def mismatch(rtx: Library, parsed: Parsed, record: Component) -> str:
    with pytest.raises(BuildError) as refused:
        check_network(rtx, parsed.network, "unet", record)
    return str(refused.value)


def test_another_dtype(rtx: Library, unet: Parsed, record: Component) -> None:
    doctored = with_input(record, 0, dtype="float16")
    assert "input sample as float32, expected float16" in mismatch(rtx, unet, doctored)


def test_another_dtype_of_an_output(rtx: Library, unet: Parsed, record: Component) -> None:
    spec = msgspec.structs.replace(record.outputs[0], dtype="uint8")
    message = mismatch(rtx, unet, msgspec.structs.replace(record, outputs=(spec,)))
    assert "output noise_pred as float32, expected uint8" in message


@pytest.mark.parametrize(
    "shape",
    [("batch", 9, "height", "width"), ("batch", 4, "height"), ("batch", 4, "height", "width", 1), (2, 4, 8, 8)],
)
def test_another_shape(rtx: Library, unet: Parsed, record: Component, shape: tuple[int | str, ...]) -> None:
    message = mismatch(rtx, unet, with_input(record, 0, shape=shape))
    written = ", ".join(map(str, shape))
    assert f"input sample as [-1, 4, -1, -1], expected sample float32[{written}]" in message


def test_a_named_axis_has_to_be_dynamic(rtx: Library, unet: Parsed, record: Component) -> None:
    """Otherwise the build would fail later, at a profile of another size than the graph's."""
    message = mismatch(rtx, unet, with_input(record, 0, shape=("batch", "channels", "height", "width")))
    assert "input sample as [-1, 4, -1, -1]" in message


def test_another_name(rtx: Library, unet: Parsed, record: Component) -> None:
    message = mismatch(rtx, unet, with_input(record, 0, name="latents"))
    assert "inputs ['encoder_hidden_states', 'sample', 'timestep'], expected ['encoder_hid" in message
    assert "'latents'" in message


def test_too_many_and_too_few_inputs(rtx: Library, unet: Parsed, record: Component) -> None:
    more = msgspec.structs.replace(record, inputs=(*record.inputs, TensorSpec("control", "float32", ("batch",))))
    assert "'control'" in mismatch(rtx, unet, more)
    fewer = msgspec.structs.replace(record, inputs=record.inputs[1:])
    assert "found the inputs" in mismatch(rtx, unet, fewer)


def test_the_log_separates_errors_from_warnings(rtx: Library) -> None:
    log, logger = make_log(rtx)
    severities = rtx.module.ILogger
    for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        logger.log(getattr(severities, severity), severity.lower())
    assert (log.errors, log.warnings) == (["internal_error", "error"], ["warning"])
    assert log.text() == "internal_error\nerror"
    assert Log().text() == ""


# Limits of the library


@pytest.mark.parametrize(("count", "fits"), [(_MAX_RANKED, True), (_MAX_RANKED + 1, False)])
def test_the_largest_number_that_the_library_ranks(rtx: Library, count: int, fits: bool) -> None:
    """`check_merging` rejects what the library would reject during the build."""
    text = f"g (float[1,{count}] x) => (int64[1,{count}] y) {{ k = Constant<value = int64[1] {{{count}}}>()\n"
    body = onnx.parser.parse_graph(text + " best, y = TopK<axis = 1>(x, k) }")
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 21)])
    log, logger = make_log(rtx)
    builder = rtx.module.Builder(logger)
    network, parser = parse_network(rtx, logger, builder, "unet", model.SerializeToString(), {})
    plan = builder.build_serialized_network(network, builder.create_builder_config())
    assert (plan is not None) == fits
    assert ("K exceeds the maximum value allowed (3840)" in log.text()) != fits
    del parser

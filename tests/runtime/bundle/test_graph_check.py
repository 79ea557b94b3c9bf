"""Graphs are checked where a bundle hands them out. Graphs that reach for other data are in `tests/attack`."""

from __future__ import annotations

import ast
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import latentrt
from latentrt.backends.onnxruntime import open_session
from latentrt.bundle import graph_check
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import file_record
from latentrt.bundle.graph_check import ComponentGraph, check_graph, graphs_by_file
from latentrt.bundle.graph_shapes import infer_values
from latentrt.bundle.manifest import Role
from latentrt.bundle.onnx_graph import MAX_GRAPH_BYTES, GraphFormatError, read_graph
from latentrt.bundle.tensors import TensorSpec
from latentrt.bundle.weights import map_weights
from latentrt.errors import GraphError
from tests.runtime.onnx_writer import constant, encode, external, graph, model, node, small_graph
from tests.runtime.small_bundle import SIGNATURES, WEIGHTS, edit_manifest, write_bundle

GRAPH = "unet/model.onnx"
ROLE, INPUTS, OUTPUTS = SIGNATURES["unet"]
EXPECTED = ComponentGraph(
    file=GRAPH, weights=WEIGHTS, weights_bytes=64, opset=21, role=ROLE, inputs=INPUTS, outputs=OUTPUTS, ranges={}
)
VALID = small_graph(INPUTS, OUTPUTS, WEIGHTS)


def refusal(data: bytes, expected: ComponentGraph = EXPECTED) -> str:
    with pytest.raises(GraphError) as refused:
        check_graph(data, expected)
    return str(refused.value)


def put(folder: Path, data: bytes) -> None:
    """Put a graph into a bundle, with its hash."""
    (folder / GRAPH).write_bytes(data)
    pin = file_record(folder / GRAPH)

    def repin(tree: dict[str, Any]) -> None:
        tree["files"][GRAPH] = {"sha256": pin.sha256, "size": pin.size}

    edit_manifest(folder, repin)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


def test_every_graph_of_the_sample_bundle_is_accepted(bundle: Bundle) -> None:
    graphs = graphs_by_file(bundle.manifest)
    assert len(graphs) == 30
    for name in graphs:
        bundle.path(name)
    for name, component in bundle.manifest.components.items():
        weights = map_weights(bundle.path(component.weights.file))
        own = bundle.read_graph(bundle.component_files(name, bundle.manifest.precision)[0]).external_names
        assert own == weights.keys(), "an engine is built from arrays of these names, and no file"


# --- The seam ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read", [lambda bundle, name: bundle.read(name, MAX_GRAPH_BYTES), Bundle.path, lambda bundle, name: bundle.verify()]
)
def test_no_way_to_a_graph_that_is_not_checked(folder: Path, read: Callable[[Bundle, str], Any]) -> None:
    read(Bundle.open(folder), GRAPH)
    put(folder, b"no graph at all")
    with pytest.raises(GraphError, match=GRAPH):
        read(Bundle.open(folder), GRAPH)
    read_other = Bundle.open(folder).read("LICENSE", 100)
    assert read_other, "what is no graph is returned as it is"


def test_backends_and_builders_reach_graphs_through_the_bundle_alone() -> None:
    """`component_files` gives names; only `Bundle.read` and `Bundle.path` lead from a name to a file."""
    runtime = Path(latentrt.__file__).parent
    builder = Path(__file__).parents[3] / "engines" / "latentrt_engines"
    folders = (runtime / "backends", runtime / "engines", builder)
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    assert {"onnxruntime.py", "openvino.py", "worker.py"} <= {path.name for path in paths}
    assert {path.name: names_in_folder(path.read_text()) for path in paths if names_in_folder(path.read_text())} == {}
    assert names_in_folder("open(self.bundle.folder / graph_name)") == ["graph_name"]


def names_in_folder(source: str) -> list[str]:
    """Return what a module appends to the path of a bundle's folder."""
    return [
        ast.unparse(each.right)
        for each in ast.walk(ast.parse(source))
        if isinstance(each, ast.BinOp) and ast.unparse(each.left).endswith("bundle.folder")
    ]


def test_a_graph_is_checked_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    monkeypatch.setattr(graph_check, "check_graph", lambda data, expected: checked.append(expected.file))
    bundle = Bundle.open(folder)
    for _ in range(3):
        bundle.read(GRAPH, MAX_GRAPH_BYTES)
        bundle.path(GRAPH)
    assert checked == [GRAPH]


def test_a_graph_too_large_to_be_one_is_not_read(folder: Path) -> None:
    with (folder / GRAPH).open("r+b") as stream:
        stream.truncate(MAX_GRAPH_BYTES + 1)  # a hole, which takes no room

    def enlarge(tree: dict[str, Any]) -> None:
        tree["files"][GRAPH] = {"sha256": file_record(folder / GRAPH).sha256, "size": MAX_GRAPH_BYTES + 1}

    edit_manifest(folder, enlarge)
    with pytest.raises(GraphError, match="expected a graph of at most"):
        Bundle.open(folder).path(GRAPH)


# --- Agreement with the manifest --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("latents", "float32", ("evaluations", 4, "height", "width")),
        TensorSpec("sample", "float16", ("evaluations", 4, "height", "width")),
        TensorSpec("sample", "float32", ("evaluations", 8, "height", "width")),
        TensorSpec("sample", "float32", ("evaluations", 4, "height")),
        TensorSpec("sample", "float32", ("evaluations", 4, "width", "height")),
    ],
)
def test_an_input_or_output_that_the_manifest_describes_otherwise(spec: TensorSpec) -> None:
    check_graph(VALID, EXPECTED)
    assert "as in the manifest" in refusal(VALID, replace(EXPECTED, inputs=(spec, *INPUTS[1:])))
    assert "as in the manifest" in refusal(VALID, replace(EXPECTED, inputs=INPUTS[::-1]))
    output = TensorSpec("noise_pred", spec.dtype, spec.shape)
    if output != OUTPUTS[0]:
        assert "the output noise_pred" in refusal(VALID, replace(EXPECTED, outputs=(output,)))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"weights": "vae_decoder/model.safetensors"}, "expected 'None'"),
        ({"weights": "unet/other.safetensors"}, "expected 'other.safetensors'"),
        ({"weights": "unet/parts/model.safetensors"}, "expected 'parts/model.safetensors'"),
        ({"weights_bytes": 3}, "up to byte 4 of unet/model.safetensors, expected at most 3"),
        ({"opset": 20}, "no operators of ONNX 20"),
        ({"file": "unet/model.xml"}, r"a name that ends in .onnx"),
    ],
)
def test_a_file_that_the_manifest_describes_otherwise(change: dict[str, Any], fragment: str) -> None:
    assert fragment in refusal(VALID, replace(EXPECTED, **change))


def test_weights_in_a_folder_below_the_graph() -> None:
    data = encode(
        model(
            graph(
                [node("Mul", ["sample", "scale"], ["noise_pred"])],
                [external("scale", 1, [1], location="parts/model.safetensors")],
                INPUTS,
                OUTPUTS,
            )
        )
    )
    check_graph(data, replace(EXPECTED, weights="unet/parts/model.safetensors"))


# --- Work -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "inputs", "fragment"),
    [(50_001, 1, "repeats node in a graph, expected it at most 50,000"), (3_200, 64, "has 204,800 inputs of nodes")],
)
def test_more_nodes_than_can_be_checked(count: int, inputs: int, fragment: str) -> None:
    """Each operation on sizes takes the check some time: 30,000 of 64 inputs took half a minute."""
    repeated = encode([(1, node("Max", ["sample"] * inputs, ["made"]))]) * count
    content = encode(graph([], [], INPUTS, OUTPUTS)) + repeated
    assert fragment in refusal(encode([(number, content if number == 7 else each) for number, each in model([])]))


def test_as_many_inputs_as_a_denoiser_in_parts_has() -> None:
    """The body of Stable Diffusion XL's takes the keys and values of 70 blocks."""
    inputs = [TensorSpec(f"keys.{index}", "float32", ("evaluations", 4)) for index in range(513)]
    summed = [node("Sum", ["keys.0", "keys.1"], ["y"])]
    outputs = [TensorSpec("y", "float32", ("evaluations", 4))]
    assert len(read_graph(encode(model(graph(summed, [], inputs[:160], outputs)))).inputs) == 160
    with pytest.raises(GraphFormatError, match="repeats input in a graph, expected it at most 512 times"):
        read_graph(encode(model(graph(summed, [], inputs, outputs))))


# --- Memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "heads"), [("denoiser", 64), ("text-encoder", 16), ("classifier", 16)])
def test_the_most_memory_of_a_role(role: Role, heads: int) -> None:
    """Scores of one head take 64 MiB, and are held twice: by the softmax too."""
    assert "GiB at node" in refusal(encode_scores(heads), replace(EXPECTED, role=role))
    check_graph(encode_scores(heads // 2 - 1), replace(EXPECTED, role=role))


def encode_classifier(layers: int) -> bytes:
    """Return a graph of large layers of weights in half, converted to float32 and transposed as a half bundle's are."""
    size = 4096 * 1024
    nodes, weights = [node("Slice", ["sample", "zero", "one", "one"], ["first"])], []
    nodes.append(node("Reshape", ["first", "column"], ["y0"]))
    for index in range(layers):
        place = {"offset": str(2 * size * index), "length": str(2 * size)}
        weights.append(external(f"w{index}", 10, [1024, 4096], location="model.safetensors", **place))
        nodes += [
            node("Cast", [f"w{index}"], [f"c{index}"], to=1),
            node("Transpose", [f"c{index}"], [f"t{index}"], perm=[1, 0]),
            node("MatMul", ["y0", f"t{index}"], [f"m{index}"]),
            node("ReduceSum", [f"m{index}"], [f"s{index}"], keepdims=0),
            node("Mul", [f"x{index}" if index else "sample", f"s{index}"], [f"x{index + 1}"]),
        ]
    nodes.append(node("Mul", [f"x{layers}", "one float"], ["noise_pred"]))
    numbers = {"zero": [0], "one": [1], "column": [1, 4096]}
    constants = [constant(name, 7, [len(each)], struct.pack(f"<{len(each)}q", *each)) for name, each in numbers.items()]
    constants.append(constant("one float", 1, [1], struct.pack("<f", 1)))
    return encode(model(graph(nodes, [*weights, *constants], INPUTS, OUTPUTS)))


def test_a_backend_may_convert_and_transpose_the_weights() -> None:
    """As that of the safety checker of Stable Diffusion 1: 0.6 GB in half, 2.3 GiB while it is loaded."""
    layers = 72
    classifier = replace(EXPECTED, role="classifier", weights_bytes=2 * 4096 * 1024 * layers)
    check_graph(encode_classifier(layers), classifier)
    assert "of a classifier with 603,979,776 bytes of weights" in refusal(encode_scores(56), classifier)


def encode_scores(heads: int) -> bytes:
    """Return a graph with scores of `heads` × 4096 × 4096 tokens, and their softmax."""
    nodes = [
        node("Slice", ["sample", "zero", "one", "one"], ["first"]),
        node("Reshape", ["first", "column shape"], ["column"]),
        node("Reshape", ["first", "row shape"], ["row"]),
        node("Expand", ["row", "many"], ["rows"]),
        node("MatMul", ["column", "rows"], ["scores"]),
        node("Softmax", ["scores"], ["means"]),
        node("ReduceMax", ["means"], ["most"], keepdims=0),
        node("Mul", ["sample", "most"], ["scaled"]),
        node("Mul", ["scaled", "scale"], ["noise_pred"]),
    ]
    numbers = {"zero": [0], "one": [1], "column shape": [1, -1, 1], "row shape": [1, 1, -1], "many": [heads, 1, 1]}
    constants = [constant(name, 7, [len(each)], struct.pack(f"<{len(each)}q", *each)) for name, each in numbers.items()]
    return encode(
        model(graph(nodes, [external("scale", 1, [1], location="model.safetensors"), *constants], INPUTS, OUTPUTS))
    )


def bomb(power: int) -> bytes:
    """Return a graph that makes (evaluations − 1) · 10^`power` + 1 numbers: next to nothing for one image."""
    nodes = [
        node("Shape", ["sample"], ["rows"], start=0, end=1),
        node("Sub", ["rows", "one"], ["others"]),
        node("Mul", ["others", "many"], ["more"]),
        node("Add", ["more", "one"], ["size"]),
        node("ConstantOfShape", ["size"], ["zeros"], value=constant("", 1, [1], bytes(4))),
        node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
        node("Add", ["sample", "sum"], ["added"]),
        node("Mul", ["added", "scale"], ["noise_pred"]),
    ]
    constants = [constant(name, 7, [1], struct.pack("<q", size)) for name, size in (("one", 1), ("many", 10**power))]
    weight = external("scale", 1, [1], location="model.safetensors")
    return encode(model(graph(nodes, [weight, *constants], INPUTS, OUTPUTS)))


def sample(rows: int, side: int = 64) -> dict[str, tuple[int, ...]]:
    return {name: tuple({"evaluations": rows, "height": side, "width": side}.get(str(axis), 1) for axis in spec.shape)
            for name, spec in ((each.name, each) for each in INPUTS)}  # fmt: skip


def test_memory_that_grows_faster_than_that_of_an_image(folder: Path) -> None:
    checked = check_graph(bomb(9), EXPECTED)
    checked.check_sizes(sample(1))
    with pytest.raises(GraphError, match=r"needs 3\.7 GiB .* for evaluations 2, .*, expected at most 0\.2 GiB"):
        checked.check_sizes(sample(2))
    check_graph(bomb(7), EXPECTED).check_sizes(sample(2))
    put(folder, bomb(9))
    session = open_session(Bundle.open(folder), "unet", threads=1)
    with pytest.raises(GraphError, match=r"unet/model\.onnx needs"):
        session.run({spec.name: np.zeros(sample(3, 8)[spec.name], spec.dtype) for spec in INPUTS})


def test_memory_may_grow_as_rows_and_as_the_square_of_the_area() -> None:
    checked = check_graph(encode_scores(4), EXPECTED)
    for side in (8, 64, 256):
        checked.check_sizes(sample(1, side))
    check_graph(VALID, EXPECTED).check_sizes(sample(1000))


def test_sizes_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    checked, calls = check_graph(VALID, EXPECTED), list[object]()

    def count(*given: Any) -> Any:
        calls.append(given)
        return infer_values(*given)

    monkeypatch.setattr(graph_check, "infer_values", count)
    for rows in (1, 2, 1, 2):
        checked.check_sizes(sample(rows))
    assert len(calls) == 2


def test_an_output_of_another_size_than_the_manifest_says() -> None:
    """The check for one image of one size cannot tell that the sides are exchanged."""
    nodes = [
        node("Transpose", ["sample"], ["turned"], perm=[0, 1, 3, 2]),
        node("Mul", ["turned", "scale"], ["noise_pred"]),
    ]
    data = encode(model(graph(nodes, [external("scale", 1, [1], location="model.safetensors")], INPUTS, OUTPUTS)))
    checked = check_graph(data, EXPECTED)
    shapes = sample(1)
    shapes["sample"] = (*shapes["sample"][:2], 64, 32)
    with pytest.raises(GraphError, match="makes noise_pred of shape"):
        checked.check_sizes(shapes)


def test_the_numbers_of_an_input_are_those_of_its_source(bundle: Bundle) -> None:
    graphs = graphs_by_file(bundle.manifest)
    assert graphs["text_encoder/model.onnx"].ranges == {"input_ids": (0, 679), "clip_skip": (0, 3)}
    assert graphs["unet/body.float32.onnx"].ranges == {}


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda tree: tree["tokenizers"]["text_encoder"].update(rows=681), "numbers from 0 to 680 as an index"),
        (lambda tree: tree["limits"].update(max_clip_skip=5), "expected 0 to"),
    ],
)
def test_a_manifest_that_allows_more_than_its_graph(
    tmp_path: Path, bundle: Bundle, change: Callable[[Any], None], fragment: str
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.folder, folder)
    edit_manifest(folder, change)
    with pytest.raises(GraphError) as refused:
        Bundle.open(folder).read("text_encoder/model.onnx", MAX_GRAPH_BYTES)
    assert fragment in str(refused.value)


@pytest.mark.parametrize("halved", [1, 2, 3])
def test_deep_features_of_any_level(halved: int) -> None:
    """The manifest names the sides of deep features, and not how often they were halved."""
    deep = TensorSpec("deep_features", "float32", ("evaluations", 4, "deep_height", "deep_width"))
    nodes = [node("Resize", ["deep_features", "", "sides"], ["large"]), node("Add", ["large", "sample"], ["sum"])]
    nodes.append(node("Mul", ["sum", "scale"], ["noise_pred"]))
    sides = constant("sides", 1, [4], struct.pack("<4f", 1, 1, 2**halved, 2**halved))
    weight = external("scale", 1, [1], location="model.safetensors")
    data = encode(model(graph(nodes, [weight, sides], [INPUTS[0], deep], OUTPUTS)))
    check_graph(data, replace(EXPECTED, inputs=(INPUTS[0], deep)))


def test_an_axis_without_a_size() -> None:
    spec = TensorSpec("sample", "float32", ("evaluations", 4, "height", "depth"))
    data = small_graph([spec], [TensorSpec("noise_pred", "float32", spec.shape)], WEIGHTS)
    named = replace(EXPECTED, inputs=(spec,), outputs=(TensorSpec("noise_pred", "float32", spec.shape),))
    assert "the axis 'depth'" in refusal(data, named)

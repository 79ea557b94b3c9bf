"""Slicing a decoder: the parts compute the pixels of the whole graph, and a defect in one of them is caught."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Component, GraphRecord, PartName
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec
from latentrt.decode import slices as sliced_decoder
from latentrt.errors import ExportError, GateError
from latentrt_export.export_warning import ExportWarning
from latentrt_export.gates.verify import Run
from latentrt_export.graphs import slices
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.slices import SliceWriter, slice_decoder
from latentrt_export.graphs.trace import OPSET
from tests.exported import Exported

LATENTS = (TensorSpec("latents", "float32", ("batch", 4, "height", "width")),)
PIXELS = (TensorSpec("pixels", "uint8", ("batch", "8*height", "8*width", 3)),)


def write_slices(model: ir.Model, folder: Path) -> SliceWriter:
    """Slice a float32 graph and write its parts to the folder that holds its weights."""
    writer = SliceWriter(
        inputs=LATENTS, outputs=PIXELS, component="vae_decoder", folder=folder, notify=lambda text: None
    )
    record = GraphRecord(file="vae_decoder/model.float32.onnx", opset=OPSET, nodes=len(model.graph))
    writer.write(model, record, "float32", [])
    return writer


FOLDER = bundle_path() / "vae_decoder"


def whole() -> ir.Model:
    return ir.load(FOLDER / "model.float32.onnx")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> SliceWriter:
    """The decoder of the sample model, whose weights are trained."""
    folder = tmp_path_factory.mktemp("sliced")
    shutil.copy(FOLDER / "model.safetensors", folder)
    return write_slices(whole(), folder)


def test_the_last_two_levels_are_stages(sample: SliceWriter) -> None:
    stages = [f"slice.{number}" for number in range(11)]
    assert [*sample.parts] == ["head", "attention", "neck", *stages]
    # Two upsamplers, two levels of two residual blocks with two convolutions each, and the last one.
    inputs = {name: {spec.name for spec in sample.parts[name].inputs} for name in stages}
    assert [name for name in stages if inputs[name] == {"features"}] == ["slice.0", "slice.5"]
    assert [name for name in stages if "residual" in inputs[name]] == ["slice.2", "slice.4", "slice.7", "slice.9"]
    assert [str(spec) for spec in sample.parts["slice.10"].outputs] == ["pixels uint8[batch, rows, width, 3]"]


def test_parts_are_small_and_sound(sample: SliceWriter) -> None:
    files = [*sample.folder.glob("*.onnx")]
    assert len(files) == 14
    for file in files:
        onnx.checker.check_model(str(file), full_check=True)
    assert sum(file.stat().st_size for file in files) < 150_000  # graphs without weights: 8 KB each were seen


@pytest.mark.parametrize("rows", [3, 8, 1000])
@pytest.mark.parametrize(
    ("batch", "height", "width"), [(1, 8, 8), (3, 17, 15), (1, 40, 9)], ids=lambda value: str(value)
)
def test_slices_equal_the_whole(
    sample: SliceWriter, monkeypatch: pytest.MonkeyPatch, rows: int, batch: int, height: int, width: int
) -> None:
    """With bands of three rows, which divide no height here; of eight; and of more than the image has."""
    monkeypatch.setattr(sliced_decoder, "_BAND_DIVISOR", 1 if rows > 8 else 10**9)
    monkeypatch.setattr(sliced_decoder, "_MIN_ROWS", rows)
    latents = np.random.default_rng(rows).standard_normal((batch, 4, height, width), np.float32)
    found = sample.open().run({"latents": latents})["pixels"]
    expected = Graph(FOLDER / "model.float32.onnx").run({"latents": latents})["pixels"]
    off = np.abs(found.astype(int) - expected.astype(int))
    # A value on the edge between two levels, as sums are in another order: of 10 million values 40 were seen.
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3
    assert expected.std() > 20, "an image, not a uniform field"


def test_without_attention_there_is_one_part_before_the_stages(sample: SliceWriter, tmp_path: Path) -> None:
    """Attention with other names is not found, so it serves as a decoder without."""
    model = whole()
    for node in model.graph:
        if node.name == "decoder.mid_block.attentions.0.to_q/Add":
            node.outputs[0].name = "queries_by_another_name"
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    found = write_slices(model, tmp_path)
    assert [*found.parts][:2] == ["head", "slice.0"]
    latents = np.random.default_rng(0).standard_normal((1, 4, 9, 8), np.float32)
    expected = sample.open().run({"latents": latents})["pixels"]
    off = np.abs(found.open().run({"latents": latents})["pixels"].astype(int) - expected.astype(int))
    assert off.max() <= 1  # as above


def rename(model: ir.Model, old: str, new: str) -> ir.Model:
    for node in model.graph:
        for value in node.outputs:
            value.name = str(value.name).replace(old, new)
    return model


def two_convolutions(model: ir.Model) -> ir.Model:
    """Put another convolution before the last one."""
    last = next(node for node in model.graph if node.name == "decoder.conv_out/Conv")
    kernel = ir.tensor(np.zeros((32, 32, 3, 3), np.float32), name="more.weight")
    weight = ir.Value(name="more.weight", type=ir.TensorType(ir.DataType.FLOAT), const_value=kernel)
    model.graph.initializers["more.weight"] = weight
    more = ir.node("Conv", [last.inputs[0], weight], {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}, name="more/Conv")
    model.graph.insert_before(last, more)
    last.replace_input_with(0, more.outputs[0])
    return model


def two_norms(model: ir.Model) -> ir.Model:
    norm = next(node for node in model.graph if node.name == "decoder.conv_norm_out/GroupNormalization")
    more = ir.node("GroupNormalization", [norm.outputs[0], *norm.inputs[1:]], {"num_groups": 8}, name="more/Norm")
    ir.convenience.replace_all_uses_with(norm.outputs[0], more.outputs[0])
    more.replace_input_with(0, norm.outputs[0])
    model.graph.insert_after(norm, more)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: rename(whole(), "up_blocks", "blocks"), "got no up_blocks and pixels"),
        (lambda: rename(whole(), "conv_norm_out", "norm_out"), "got no decoder.conv_norm_out/GroupNormalization"),
        (lambda: two_convolutions(whole()), "3 × 3 convolution before pixels"),
        (lambda: two_norms(whole()), "got 2 norms before pixels"),
    ],
)
def test_another_graph_is_rejected(model: object, message: str) -> None:
    assert callable(model)
    with pytest.raises(ExportError, match=message):
        slice_decoder(model())


Models = dict[PartName, ir.Model]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    exported: Exported = request.getfixturevalue(request.param)
    return Bundle.open(exported.bundle)


@pytest.fixture
def decoder(bundle: Bundle) -> Component:
    return bundle.manifest.components["vae_decoder"]


def test_the_decoders_float32_graph_has_slices(bundle: Bundle, decoder: Component) -> None:
    assert {"head", "attention", "neck", "slice.0", "slice.10"} <= decoder.parts.keys()
    whole = decoder.graphs["float32"].file
    for name, part in decoder.parts.items():
        assert set(part.graphs) == {"float32"}, "half graphs are for GPUs, which decode whole"
        record = part.graphs["float32"]
        assert record.file == whole.replace("model", name)
        model = onnx.load(bundle.path(record.file), load_external_data=False)
        assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", OPSET)]
        assert record.nodes == len(model.graph.node)
        assert [spec.name for spec in part.inputs] == [value.name for value in model.graph.input]
        assert [spec.name for spec in part.outputs] == [value.name for value in model.graph.output]


def test_the_last_part_records_the_comparison_of_all(decoder: Component) -> None:
    gates = {name: part.graphs["float32"].gate for name, part in decoder.parts.items()}
    (last,) = (name for name, gate in gates.items() if gate)
    assert [spec.name for spec in decoder.parts[last].outputs] == ["pixels"]
    assert [result.shapes for result in gates[last]] == [
        {"latents": (1, 4, 16, 16)},
        {"latents": (3, 4, 17, 15)},
        {"latents": (1, 4, 41, 32)},
    ]
    assert all((result.metric, result.bound) == ("levels", 1) for result in gates[last])
    assert all(result.value <= 1 for result in gates[last])


def write_from(folder: Path, target: Path, rename: Mapping[str, str] | None = None) -> SliceWriter:
    """Slice the decoder's graph of a float32 bundle in another folder, with other names for some of its values."""
    shutil.copy(folder / "model.safetensors", target)
    model = ir.load(folder / "model.onnx")
    for value in (value for node in model.graph for value in node.outputs):
        value.name = (rename or {}).get(str(value.name), value.name)
    feeds = {"latents": np.random.default_rng(0).standard_normal((1, 4, 9, 8), np.float32)}
    runs = [Run(feeds, Graph(folder / "model.onnx").run(feeds))]
    phases: list[str] = []
    writer = SliceWriter(inputs=LATENTS, outputs=PIXELS, component="vae_decoder", folder=target, notify=phases.append)
    record = GraphRecord(file="vae_decoder/model.onnx", opset=OPSET, nodes=len(model.graph))
    writer.write(model, record, "float16", runs)
    assert not writer.parts
    assert not phases
    writer.write(model, record, "float32", runs)
    assert phases == ["checking the slices of the float32 graph"]
    return writer


def other_weight(parts: Models) -> None:
    """Give one stage the bias of another."""
    one, two = (
        parts[stage].graph.initializers[f"decoder.up_blocks.{block}.resnets.1.conv1.bias"]
        for stage, block in (("slice.3", 2), ("slice.8", 3))
    )
    one.const_value = two.const_value


def other_epsilon(parts: Models) -> None:
    (epsilon,) = (value for name, value in parts["slice.1"].graph.initializers.items() if name.endswith("/epsilon"))
    epsilon.const_value = ir.tensor(np.float32(0.1), name=epsilon.name)


def no_edge(parts: Models) -> None:
    """Treat rows outside of the image as if they were inside."""
    (inside,) = (value for value in parts["slice.1"].graph.inputs if value.name == "inside")
    (mask,) = inside.consumers()
    ir.convenience.replace_all_uses_with(mask.outputs[0], mask.inputs[0])  # type: ignore[arg-type]
    parts["slice.1"].graph.remove(mask)
    parts["slice.1"].graph.inputs.remove(inside)


def wrong_half_of_the_halo(parts: Models) -> None:
    """Drop two rows above and none below after the upsampling."""
    constants = parts["slice.0"].graph.initializers
    for name, value in constants.items():
        for ending, index in (("/first", 2), ("/end", 1 << 40)):
            if name.endswith(ending):
                value.const_value = ir.tensor(np.array([index]), name=name)


def not_finite(parts: Models) -> None:
    bias = parts["head"].graph.initializers["decoder.conv_in.bias"]
    bias.const_value = ir.tensor(np.full(bias.const_value.shape.numpy(), np.nan, np.float32), name=bias.name)  # type: ignore[union-attr]


@pytest.mark.parametrize("spoil", [other_weight, other_epsilon, no_edge, wrong_half_of_the_halo, not_finite])
def test_a_defect_in_a_slice_is_caught(
    sd1: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Models], None]
) -> None:
    def slice_and_spoil(model: ir.Model) -> Models:
        parts = slice_decoder(model)
        spoil(parts)
        return parts

    folder = sd1.bundle / "vae_decoder"
    monkeypatch.setattr(slices, "slice_decoder", slice_and_spoil)
    with pytest.raises(
        GateError, match=r"the float32 graph and its slices: pixels is .* \(levels\) from its own"
    ) as miss:
        write_from(folder, tmp_path)
    assert "for inputs of shape {'latents': (1, 4, 9, 8)}" in str(miss.value)
    assert "`parts=False`" in str(miss.value)


def test_without_a_defect_it_passes(sd1: Exported, tmp_path: Path) -> None:
    writer = write_from(sd1.bundle / "vae_decoder", tmp_path)
    (result,) = writer.parts["slice.10"].graphs["float32"].gate
    assert result.value <= 1


@pytest.mark.parametrize("name", ["decoder.up_blocks.3.resnets.0/Add", "decoder.up_blocks.1.upsamplers.0.conv/Conv"])
def test_a_decoder_of_another_structure_stays_whole_with_a_warning(sd1: Exported, tmp_path: Path, name: str) -> None:
    with pytest.warns(ExportWarning) as warnings:
        writer = write_from(sd1.bundle / "vae_decoder", tmp_path, {name: "other"})
    assert writer.parts == {}
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    (warning,) = [str(each.message) for each in warnings]
    assert warning.startswith("vae_decoder: the decoder cannot be sliced")
    assert f"no {name} in" in warning
    assert SliceWriter.drawback in warning

"""A decoder that is cut into slices: which parts there are, and that together they are the whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from latentrt.bundle.sample import bundle_path
from latentrt.decode import slices as sliced_decoder
from latentrt.errors import ExportError
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.slices import slice_decoder
from tests.export.graphs.sliced import Sliced, sliced

FOLDER = bundle_path() / "vae_decoder"


def whole() -> ir.Model:
    return ir.load(FOLDER / "model.float32.onnx")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sliced:
    """The decoder of the sample model, whose weights are trained."""
    folder = tmp_path_factory.mktemp("sliced")
    shutil.copy(FOLDER / "model.safetensors", folder)
    return sliced(whole(), folder)


def test_the_last_two_levels_are_stages(sample: Sliced) -> None:
    stages = [f"slice.{number}" for number in range(11)]
    assert [*sample.parts] == ["head", "attention", "neck", *stages]
    # Two upsamplers, two levels of two residual blocks with two convolutions each, and the last one.
    takes = {name: {spec.name for spec in sample.parts[name].inputs} for name in stages}
    assert [name for name in stages if takes[name] == {"features"}] == ["slice.0", "slice.5"]
    assert [name for name in stages if "residual" in takes[name]] == ["slice.2", "slice.4", "slice.7", "slice.9"]
    assert [str(spec) for spec in sample.parts["slice.10"].outputs] == ["pixels uint8[batch, rows, width, 3]"]


def test_parts_are_small_and_sound(sample: Sliced) -> None:
    files = [*sample.folder.glob("*.onnx")]
    assert len(files) == 14
    for file in files:
        onnx.checker.check_model(str(file), full_check=True)
    assert sum(file.stat().st_size for file in files) < 150_000  # graphs without weights: 8 KB each were seen


@pytest.mark.parametrize("rows", [3, 8, 1000])
@pytest.mark.parametrize(
    ("batch", "height", "width"), [(1, 8, 8), (3, 17, 15), (1, 40, 9)], ids=lambda value: str(value)
)
def test_slices_are_the_whole(
    sample: Sliced, monkeypatch: pytest.MonkeyPatch, rows: int, batch: int, height: int, width: int
) -> None:
    """With bands of three rows, which divide no height here; of eight; and of more than the picture has."""
    monkeypatch.setattr(sliced_decoder, "_SHARE", 1 if rows > 8 else 10**9)
    monkeypatch.setattr(sliced_decoder, "_FEWEST_ROWS", rows)
    latents = np.random.default_rng(rows).standard_normal((batch, 4, height, width), np.float32)
    found = sample.decoder().run({"latents": latents})["pixels"]
    expected = Graph(FOLDER / "model.float32.onnx").run({"latents": latents})["pixels"]
    off = np.abs(found.astype(int) - expected.astype(int))
    # A value on the edge between two levels, as sums are in another order: of 10 million values 40 were seen.
    assert off.max() <= 1
    assert (off > 0).mean() < 1e-3
    assert expected.std() > 20, "a picture, not a plain field"


def test_without_attention_there_is_one_part_before_the_stages(sample: Sliced, tmp_path: Path) -> None:
    """Attention by another spelling is not cut either, so it serves as a decoder without."""
    model = whole()
    for node in model.graph:
        if node.name == "decoder.mid_block.attentions.0.to_q/Add":
            node.outputs[0].name = "queries_by_another_name"
    shutil.copy(FOLDER / "model.safetensors", tmp_path)
    found = sliced(model, tmp_path)
    assert [*found.parts][:2] == ["head", "slice.0"]
    latents = np.random.default_rng(0).standard_normal((1, 4, 9, 8), np.float32)
    expected = sample.decoder().run({"latents": latents})["pixels"]
    off = np.abs(found.decoder().run({"latents": latents})["pixels"].astype(int) - expected.astype(int))
    assert off.max() <= 1  # as above


def rename(model: ir.Model, old: str, new: str) -> ir.Model:
    for node in model.graph:
        for value in node.outputs:
            value.name = str(value.name).replace(old, new)
    return model


def two_convolutions(model: ir.Model) -> ir.Model:
    """The last one behind another of its kind."""
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
    ("model", "words"),
    [
        (lambda: rename(whole(), "up_blocks", "blocks"), "found no up_blocks and pixels"),
        (lambda: rename(whole(), "conv_norm_out", "norm_out"), "found no decoder.conv_norm_out/GroupNormalization"),
        (lambda: two_convolutions(whole()), "found another convolution than one of 3 × 3 at pixels"),
        (lambda: two_norms(whole()), "found 2 norms before pixels"),
    ],
)
def test_what_cannot_be_sliced_is_refused(model: object, words: str) -> None:
    assert callable(model)
    with pytest.raises(ExportError, match=words):
        slice_decoder(model())

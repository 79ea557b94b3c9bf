"""The conversion of a component's names and shapes, and the copies of its tensors; missing and wrong ones."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.bundle.safetensors_header import TensorPlace
from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.conversion import (
    TEXT_ENCODER,
    UNET,
    VAE,
    TensorView,
    convert,
    copy_tensors,
)
from latentrt_export.checkpoints.weights import read_header_of
from latentrt_export.export_warning import ExportWarning
from tests.ldm import Weights, write_single_file
from tests.tiny import make_checkpoint

LAYOUTS = {"text_encoder": TEXT_ENCODER, "unet": UNET, "vae": VAE}


def describe(weights: Weights, prefix: str) -> dict[str, TensorPlace]:
    """Return the places of the tensors with the prefix in a file that is never read."""
    kept = {name: weight for name, weight in weights.items() if name.startswith(prefix)}
    sizes = {name: weight.numel() * weight.element_size() for name, weight in kept.items()}
    return {
        name: TensorPlace(dtype="F32", shape=tuple(weight.shape), start=0, end=sizes[name])
        for name, weight in kept.items()
    }


class Tiny:
    """A tiny 1.x checkpoint in both layouts."""

    def __init__(self, folder: Path) -> None:
        self.folder = make_checkpoint(folder / "checkpoint")
        self.weights = load_file(write_single_file(self.folder, folder / "model.safetensors", "sd1"))

    def convert(self, component: str, weights: Weights) -> Mapping[str, TensorView]:
        config: dict[str, Any] = json.loads((self.folder / component / "config.json").read_text())
        return convert(component, LAYOUTS[component], describe(weights, LAYOUTS[component].prefix), config)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("model.diffusion_model.middle_block.1.proj_in.bias", "unet"),
        ("first_stage_model.decoder.up.2.block.0.conv1.weight", "vae"),
        ("first_stage_model.encoder.mid.attn_1.q.weight", "vae"),
        ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.bias", "text_encoder"),
    ],
)
def test_a_missing_weight(key: str, component: str, tiny: Tiny) -> None:
    weights = {name: weight for name, weight in tiny.weights.items() if name != key}
    with pytest.raises(CheckpointError, match=f"{component}: 1 weights are missing"):
        tiny.convert(component, weights)


def test_no_weights_at_all(tiny: Tiny) -> None:
    for component in LAYOUTS:
        with pytest.raises(CheckpointError, match=f"{component}: [0-9]+ weights are missing"):
            tiny.convert(component, {})


def test_a_configuration_of_many_more_layers_is_not_built(tiny: Tiny) -> None:
    config = {**json.loads((tiny.folder / "text_encoder" / "config.json").read_text()), "num_hidden_layers": 10**4}
    places = describe(tiny.weights, TEXT_ENCODER.prefix)
    with pytest.raises(
        CheckpointError, match=r"text_encoder: config\.json describes a model of at least 1,\d\d\d param"
    ):
        convert("text_encoder", TEXT_ENCODER, places, config)


@pytest.mark.parametrize("repeated", ["", UNET.prefix])  # diffusers removes every prefix
def test_a_unet_of_many_blocks_is_not_converted(repeated: str, tiny: Tiny) -> None:
    """diffusers' converter would take a minute for as many as a header may have."""
    more = {f"{UNET.prefix}{repeated}input_blocks.{index}.0.x": torch.zeros(1) for index in range(101)}
    with pytest.raises(CheckpointError, match=r"unet: its tensors are in \d{3} blocks, expected 100 at most"):
        tiny.convert("unet", tiny.weights | more)


def test_an_unexpected_weight(tiny: Tiny) -> None:
    weights = tiny.weights | {"model.diffusion_model.middle_block.1.extra.bias": torch.zeros(1)}
    with pytest.warns(ExportWarning, match="unet: ignored 1 tensors .*the first is mid_block"):
        found = tiny.convert("unet", weights)
    assert found.keys() == tiny.convert("unet", tiny.weights).keys()


def test_a_weight_of_another_shape(tiny: Tiny) -> None:
    weights = tiny.weights | {"model.diffusion_model.out.2.bias": torch.zeros(7)}
    with pytest.raises(CheckpointError, match=r"unet: conv_out.bias has shape \(7,\), expected \(4,\)"):
        tiny.convert("unet", weights)


def test_text_weights_without_their_inner_module(tiny: Tiny) -> None:
    older = {name.replace("transformer.text_model.", "transformer."): one for name, one in tiny.weights.items()}
    assert older.keys() != tiny.weights.keys()
    assert tiny.convert("text_encoder", older).keys() == tiny.convert("text_encoder", tiny.weights).keys()


# Tensors that are not read


@pytest.fixture(scope="module", params=[torch.float64, torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    torch.manual_seed(0)
    weights = {
        "matrix": torch.randn(6, 4).to(request.param),
        "convolution": torch.randn(3, 2, 1, 1).to(request.param),
        "number": torch.randn(()).to(request.param),
        "nothing": torch.zeros(0, 3).to(request.param),
    }
    path = tmp_path_factory.mktemp("stored") / "weights.safetensors"
    save_file(weights, path)
    return path, weights


def test_changes_of_layout_are_those_of_torch(stored: tuple[Path, Weights], tmp_path: Path) -> None:
    path, weights = stored
    places = read_header_of(path).tensors
    lazy: dict[str, Any] = {name: TensorView(place=place) for name, place in places.items()}

    def change(one: dict[str, Any]) -> dict[str, Any]:
        return {
            "plain": one["matrix"],
            "first": one["matrix"][:2, :].clone().detach(),
            "last": one["matrix"][4:, :].clone().detach(),
            "transposed": one["matrix"].T.contiguous(),
            "linear": one["convolution"][:, :, 0, 0],
            "part of a part": one["matrix"].T.contiguous()[1:][:, :3],
            "number": one["number"],
            "nothing": one["nothing"],
        }

    expected, found = change(weights), change(lazy)
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in expected.items()}
    assert {name: one.ndim for name, one in found.items()} == {name: one.ndim for name, one in expected.items()}
    copy_tensors(path, found, tmp_path / "copy.safetensors")
    copied = load_file(tmp_path / "copy.safetensors")
    assert copied.keys() == expected.keys()
    for name, one in expected.items():
        assert copied[name].dtype == one.dtype
        assert torch.equal(copied[name].float(), one.float())


def test_an_index_out_of_range_is_an_error_before_it_is_read(stored: tuple[Path, Weights]) -> None:
    places = read_header_of(stored[0]).tensors
    with pytest.raises(IndexError):
        _ = TensorView(place=places["matrix"])[:, :, 0, 0]


def test_a_file_that_was_truncated_since_its_header_was_read(stored: tuple[Path, Weights], tmp_path: Path) -> None:
    tensors = {name: TensorView(place=place) for name, place in read_header_of(stored[0]).tensors.items()}
    path = tmp_path / "truncated.safetensors"
    path.write_bytes(stored[0].read_bytes()[:-1])
    with pytest.raises(OSError, match=r"it ends after \d+ bytes, expected \d+ or more"):
        copy_tensors(path, tensors, tmp_path / "copy.safetensors")


@pytest.mark.parametrize("shape", [(7,), (), (3, 2**62, 0), (2**80, 0)])
def test_a_weight_of_a_shape_that_no_array_has(shape: tuple[int, ...], tiny: Tiny) -> None:
    config = json.loads((tiny.folder / "vae" / "config.json").read_text())
    name = f"{VAE.prefix}encoder.mid.attn_1.q.weight"
    places = describe(tiny.weights, VAE.prefix) | {name: TensorPlace(dtype="F32", shape=shape, start=0, end=0)}
    with pytest.raises(CheckpointError, match=r"vae: .*(has shape|do not have the layout)"):
        convert("vae", VAE, places, config)


def test_a_weight_of_another_dtype(tiny: Tiny) -> None:
    """OpenCLIP's names do not all say that they are weights; those of diffusers do."""
    config = json.loads((tiny.folder / "text_encoder" / "config.json").read_text())
    name = f"{TEXT_ENCODER.prefix}transformer.text_model.final_layer_norm.weight"
    places = describe(tiny.weights, TEXT_ENCODER.prefix)
    places[name] = TensorPlace(dtype="I32", shape=places[name].shape, start=0, end=places[name].end)
    with pytest.raises(CheckpointError, match=r"text_encoder stores .* as I32, expected one of F64"):
        convert("text_encoder", TEXT_ENCODER, places, config)


def test_copies_need_the_memory_of_one_tensor(tmp_path: Path) -> None:
    size = 1 << 20
    path = tmp_path / "weights.safetensors"
    save_file({f"{index}": torch.full((2, size // 8), index, dtype=torch.float32) for index in range(32)}, path)
    places = read_header_of(path).tensors
    tensors = {name: TensorView(place=place).T for name, place in places.items()}  # which is a copy of its own
    tracemalloc.start()
    try:
        copy_tensors(path, tensors, tmp_path / "copy.safetensors")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * size, "the tensor as it is stored and as it is written, and those of the one before at most"
    assert load_file(tmp_path / "copy.safetensors")["31"].shape == (size // 8, 2)

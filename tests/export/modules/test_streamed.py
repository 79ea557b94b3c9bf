"""Modules whose weights stay in their files are evaluated like those in memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentrt.errors import CheckpointError
from latentrt_export.checkpoints.stored_tensor import StoredTensor
from latentrt_export.checkpoints.weights import load_pretrained
from latentrt_export.modules.streamed import (
    WeightsByName,
    is_stored_as_half,
    read_parameter,
    stand_in_weights,
    streamed_weights,
)

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    AutoencoderTiny(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def streamed(folder: Path) -> Any:
    return load_pretrained(AutoencoderTiny, folder, None)


@torch.no_grad()
def test_an_evaluation_equals_the_librarys(folder: Path, streamed: Any) -> None:
    pixels = torch.rand(1, 3, 32, 32)
    with streamed_weights(streamed):
        found = streamed.encoder(pixels)
    assert torch.equal(found, AutoencoderTiny.from_pretrained(folder).encoder(pixels))


@torch.no_grad()
def test_one_layers_weights_are_loaded_at_a_time(streamed: Any) -> None:
    convolutions = [layer for layer in streamed.modules() if isinstance(layer, nn.Conv2d)]
    loaded = []

    def make_hook(layer: nn.Module) -> Callable[..., None]:
        return lambda *_: loaded.append(sum(not each.weight.is_meta for each in convolutions))

    for layer in convolutions:
        layer.register_forward_pre_hook(make_hook(layer))
    assert all(parameter.is_meta for parameter in streamed.parameters())
    with streamed_weights(streamed):
        streamed.encoder(torch.rand(1, 3, 16, 16))
    assert {*loaded} == {1}
    assert all(parameter.is_meta for parameter in streamed.parameters())


@torch.no_grad()
def test_a_failed_evaluation_releases_what_it_loaded(streamed: Any) -> None:
    with pytest.raises(RuntimeError), streamed_weights(streamed):
        streamed.encoder(torch.rand(1, 5, 16, 16))  # of more channels than it takes
    assert all(parameter.is_meta for parameter in streamed.parameters())


@torch.no_grad()
def test_other_values_take_the_place_of_the_weights() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    before = [each.clone() for each in module.parameters()]
    zeros = {name: torch.zeros_like(each) for name, each in module.named_parameters()}
    with streamed_weights(module, zeros.__getitem__):
        assert not module(torch.ones(1, 2)).any()
    assert all(torch.equal(*each) for each in zip(module.parameters(), before, strict=True))


def test_stand_ins_have_shapes_and_no_values(streamed: Any) -> None:
    with stand_in_weights(streamed):
        made = streamed.encoder(torch.zeros(1, 3, 32, 32))
        assert all(not parameter.is_meta for parameter in streamed.parameters())
    assert tuple(made.shape) == (1, 4, 4, 4)
    assert all(parameter.is_meta for parameter in streamed.parameters())


def test_weights_are_read_by_canonical_name(folder: Path, streamed: Any) -> None:
    weights, stored = WeightsByName(streamed, lambda name: f"canonical.{name}"), load_file(folder / FILE)
    assert {*weights} == {f"canonical.{name}" for name in stored}
    assert len(weights) == len(stored)
    for name, tensor in stored.items():
        assert torch.equal(weights[f"canonical.{name}"], tensor)
        assert weights.shape(f"canonical.{name}") == tuple(tensor.shape)


def test_half_weights_become_float32(folder: Path) -> None:
    stored = {name: tensor.half() for name, tensor in load_file(folder / FILE).items()}
    save_file(stored, folder / FILE, metadata={"format": "pt"})
    module = load_pretrained(AutoencoderTiny, folder, None)
    for name, parameter in module.named_parameters():
        assert is_stored_as_half(parameter)
        assert torch.equal(read_parameter(parameter), stored[name].float())
    assert not is_stored_as_half(nn.Parameter(torch.zeros(1).half()))


@pytest.mark.parametrize("spoil", ["missing", "shorter"])
def test_a_file_that_goes_while_it_is_read_is_an_error(folder: Path, streamed: Any, spoil: str) -> None:
    if spoil == "missing":
        (folder / FILE).unlink()
    else:
        (folder / FILE).write_bytes((folder / FILE).read_bytes()[:2000])
    *_, last = sorted(streamed.parameters(), key=lambda parameter: parameter.stored.end)
    with pytest.raises(CheckpointError, match=r"cannot be read|became shorter"):
        read_parameter(last)


@pytest.mark.parametrize(
    "tensor", [torch.tensor([1, -2]), torch.tensor([True]), torch.ones(2, 0), torch.tensor(3.5, dtype=torch.float64)]
)
def test_every_shape_and_kind_of_tensor_is_read(tmp_path: Path, tensor: Tensor) -> None:
    save_file({"x": tensor}, tmp_path / FILE)
    dtype = {torch.int64: "I64", torch.bool: "BOOL", torch.float32: "F32", torch.float64: "F64"}[tensor.dtype]
    size = (tmp_path / FILE).stat().st_size
    place = StoredTensor(
        file=tmp_path / FILE, dtype=dtype, shape=tuple(tensor.shape), start=size - tensor.nbytes, end=size
    )
    expected = tensor.float() if tensor.is_floating_point() else tensor
    assert torch.equal(place.load(), expected)


def test_a_dtype_without_numbers_is_refused(tmp_path: Path) -> None:
    place = StoredTensor(file=tmp_path / FILE, dtype="F4", shape=(2,), start=0, end=1)
    with pytest.raises(CheckpointError, match="got a tensor of F4, expected one of"):
        place.load()

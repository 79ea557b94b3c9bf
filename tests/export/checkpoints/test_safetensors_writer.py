"""A file that is written one tensor at a time is the one that safetensors writes of all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.bundle.safetensors_header import read_header
from latentrt_export.checkpoints.safetensors_writer import SafetensorsWriter

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Path:
    specs = {name: (NAMES[one.dtype], tuple(one.shape)) for name, one in tensors.items()}
    with SafetensorsWriter(path, specs, metadata) as writer:
        for name in writer.names:
            writer.write(name, bytes(tensors[name].contiguous().view(torch.uint8).numpy().reshape(-1)))
    return path


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}])
def test_the_file_is_that_of_safetensors(metadata: dict[str, str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {name: torch.randn(3, 5).to(dtype) for name, dtype in zip("zya", (torch.float16,) * 3, strict=True)} | {
        "größe.weight": torch.randn(2).half(),
        "none": torch.randn(0, 4).half(),
    }
    save_file(tensors, tmp_path / "expected.safetensors", metadata=metadata or None)
    found = write(tmp_path / "found.safetensors", tensors, metadata)
    assert found.read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


def test_every_dtype_is_aligned(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {str(dtype): torch.randn(5).to(dtype) for dtype in reversed(NAMES)}
    path = write(tmp_path / "found.safetensors", tensors, {})
    with path.open("rb") as stream:
        header = read_header(stream, path.stat().st_size)
    assert header.file_size == path.stat().st_size
    assert all(place.start % ((place.end - place.start) // 5) == 0 for place in header.tensors.values())
    loaded = load_file(path)
    assert all(torch.equal(loaded[name].float(), one.float()) for name, one in tensors.items())


def test_arrays_are_written_as_they_are(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with SafetensorsWriter(tmp_path / "x.safetensors", {"x": ("F32", (2, 3)), "y": ("F32", ())}, {}) as writer:
        writer.write("x", values)
        writer.write("y", np.array(7, dtype=np.float32))
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded["x"].tolist() == values.tolist()
    assert loaded["y"].item() == 7


def test_tensors_in_another_order_or_of_another_size(tmp_path: Path) -> None:
    specs = {"a": ("F32", (2, 2)), "b": ("F32", (2,))}
    with SafetensorsWriter(tmp_path / "x.safetensors", specs, {}) as writer:
        with pytest.raises(ValueError, match="got the tensor b, expected a"):
            writer.write("b", bytes(8))
        with pytest.raises(ValueError, match="got 8 contiguous bytes of a, expected 16"):
            writer.write("a", bytes(8))
        with pytest.raises(ValueError, match="got 16 scattered bytes of a, expected 16"):
            writer.write("a", np.zeros((2, 2), np.float32).T[::-1])
        writer.write("a", bytes(16))
        writer.write("b", bytes(8))
        with pytest.raises(ValueError, match="got the tensor b, expected None"):
            writer.write("b", bytes(8))


def test_missing_tensors(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="got 0 tensors, expected 1; the next is a"),
        SafetensorsWriter(tmp_path / "x.safetensors", {"a": ("F32", (1,))}, {}),
    ):
        pass
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "y.safetensors", {"a": ("F32", (1,))}, {}):
        raise KeyError("the error of the caller, not the missing tensor")


@pytest.mark.parametrize(("dtype", "shape"), [("F31", (1,)), ("F4", (1,))])
def test_tensors_that_the_format_does_not_have(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"F31, expected one of|F4 of shape \(1,\), expected whole bytes"):
        SafetensorsWriter(tmp_path / "x.safetensors", {"a": (dtype, shape)}, {})
    assert not (tmp_path / "x.safetensors").exists()

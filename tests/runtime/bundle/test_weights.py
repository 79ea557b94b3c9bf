"""Weights are mapped as safetensors itself reads them, and a file that lies about itself is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from latentrt.bundle.weights import map_weights
from latentrt.errors import BundleError


def test_arrays_are_those_that_were_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    stored: dict[str, NDArray[Any]] = {
        "a.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "b.bias": rng.standard_normal(7).astype(np.float16),
        "scalar": np.array(2.5, np.float32),
        "c.weight": rng.integers(-127, 128, (4, 2)).astype(np.int8),
        "c.input_zero_point": np.array(200, np.uint8),
    }
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    mapped = map_weights(tmp_path / "model.safetensors")
    assert set(mapped) == set(stored)
    for name, array in stored.items():
        np.testing.assert_array_equal(mapped[name], array)
        assert mapped[name].dtype == array.dtype
        assert not mapped[name].flags.writeable


def written(path: Path, header: object, data: bytes = bytes(16)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b"{not json",
        [],
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}},
        {"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}},
        {"a": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4]}},
    ],
)
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, header: object) -> None:
    with pytest.raises(BundleError, match="cannot be read as safetensors"):
        map_weights(written(tmp_path / "model.safetensors", header))


@pytest.mark.parametrize("data", [b"", b"\x01", b"\xff" * 64])
def test_a_file_too_short_for_its_header_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(BundleError, match="cannot be read as safetensors"):
        map_weights(path)

"""Weights are mapped as safetensors itself reads them, and a file that lies about itself is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from latentrt.bundle.safetensors_header import MAX_HEADER_BYTES, MAX_METADATA, MAX_TENSORS, read_header
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


def tensor(first: int, last: int, **changes: object) -> dict[str, object]:
    """Return the entry of a float32 tensor of these bytes."""
    return {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last], **changes}


HEADERS: dict[str, tuple[object, str]] = {
    "overlap": ({"a": tensor(0, 12), "b": tensor(8, 16)}, "'b' overlaps"),
    "two names of the same bytes": ({"a": tensor(0, 16), "b": tensor(0, 16)}, "overlaps"),
    "a hole": ({"a": tensor(0, 8), "b": tensor(12, 16)}, "'b' follows a hole"),
    "a hole at the beginning": ({"a": tensor(4, 16)}, "hole"),
    "bytes behind the last tensor": ({"a": tensor(0, 12)}, "expected"),
    "a name twice": (b'{"a": {}, "a": {}}', "'a' twice"),
    "a product beyond 64 bits": ({"a": tensor(0, 16, shape=[2**62] * 16)}, "do not hold"),
    "a million axes": ({"a": tensor(0, 16, shape=[1] * 100_000)}, "length <= 16"),
    "a negative axis": ({"a": tensor(0, 16, shape=[-2, -2])}, ">= 0"),
    "an axis that is no number": ({"a": tensor(0, 16, shape=["4"])}, "Expected `int`"),
    "an axis that is true": ({"a": tensor(0, 4, shape=[True])}, "Expected `int`"),
    "backwards": ({"a": tensor(0, 16, data_offsets=[16, 0])}, "do not hold"),
    "three offsets": ({"a": tensor(0, 16, data_offsets=[0, 8, 16])}, "length 2"),
    "an unknown key": ({"a": tensor(0, 16, file="/etc/passwd")}, "unknown field"),
    "an unknown dtype": ({"a": tensor(0, 16, dtype="\x1b[2J")}, r"'\x1b[2J'"),
    "metadata that is a list": ({"__metadata__": [], "a": tensor(0, 16)}, "__metadata__"),
    "metadata of lists": ({"__metadata__": {"a": []}, "a": tensor(0, 16)}, "__metadata__"),
    "nested": (b'{"a": ' + b"[" * 100_000, "deeper"),
    "beyond 64 bits": (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 99999999999999999999]}}', "64 bits"),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}', "finite"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies(tmp_path: Path, name: str) -> None:
    header, message = HEADERS[name]
    with pytest.raises(BundleError) as caught:
        map_weights(written(tmp_path / "model.safetensors", header))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_length_of_a_header_is_checked_before_it_is_read() -> None:
    class Endless(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert size == 8, "the length alone"
            return (10**9).to_bytes(8, "little")

    with pytest.raises(ValueError, match=f"expected {MAX_HEADER_BYTES:,} at most"):
        read_header(Endless(), 10**12)


@pytest.mark.parametrize("tensors", [MAX_TENSORS, MAX_TENSORS + 1])
def test_the_number_of_tensors_is_bounded(tmp_path: Path, tensors: int) -> None:
    """At the bound also with the most axes, which take the most values of JSON."""
    empty = {"dtype": "F32", "shape": [0] * 16, "data_offsets": [0, 0]}
    path = written(tmp_path / "model.safetensors", {f"{index}": empty for index in range(tensors)}, b"")
    with path.open("rb") as stream:
        if tensors == MAX_TENSORS:
            assert len(read_header(stream, path.stat().st_size).tensors) == tensors
            return
        with pytest.raises(ValueError, match=f"has {tensors:,} tensors, expected {MAX_TENSORS:,} at most"):
            read_header(stream, path.stat().st_size)


@pytest.mark.parametrize("texts", [MAX_METADATA, MAX_METADATA + 1])
def test_the_number_of_texts_in_the_metadata_is_bounded(tmp_path: Path, texts: int) -> None:
    metadata = {f"{index}": "x" for index in range(texts)}
    path = written(tmp_path / "model.safetensors", {"__metadata__": metadata}, b"")
    with path.open("rb") as stream:
        if texts == MAX_METADATA:
            assert read_header(stream, path.stat().st_size).metadata == metadata
            return
        with pytest.raises(ValueError, match=f"has {texts:,} texts in __metadata__, expected {MAX_METADATA:,} at most"):
            read_header(stream, path.stat().st_size)


def test_the_order_of_names_is_free(tmp_path: Path) -> None:
    header = {"b": tensor(8, 16), "empty": tensor(8, 8), "a": tensor(0, 8)}
    assert list(map_weights(written(tmp_path / "model.safetensors", header))) == ["b", "empty", "a"]

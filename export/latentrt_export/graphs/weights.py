"""Stores weights apart from graphs, as safetensors that a graph refers to by offset and length.

One `model.safetensors` serves every graph of its component, and a graph can use that of any model with the same
architecture.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from safetensors.torch import save_file
from torch import Tensor

from latentrt.bundle.manifest import Precision, WeightsRecord
from latentrt.bundle.onnx_types import WEIGHT_TYPES
from latentrt.bundle.safetensors_header import read_header

__all__ = ["StoredWeights", "store"]

# Of floating tensors; an int8 component stores those that are not quantised as half.
_TORCH_DTYPES = {"float16": torch.float16, "float32": torch.float32, "int8": torch.float16}


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """A weights file and the place of each tensor in it.

    Attributes:
        path: the path of the file.
        weights: names of the checkpoint's own tensors; the others are scales and zero points.
        places: name → (dtype, shape, offset in bytes, length in bytes).
    """

    path: Path
    weights: frozenset[str]
    places: Mapping[str, tuple[ir.DataType, tuple[int, ...], int, int]]

    def external(self, name: str) -> ir.ExternalTensor:
        """Return a reference to one tensor, for a graph in the same folder."""
        dtype, shape, offset, length = self.places[name]
        return ir.ExternalTensor(
            self.path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=self.path.parent
        )

    def record(self, file: str, precision: Precision) -> WeightsRecord:
        """Return the manifest's record of the file, with the path `file` in the bundle."""
        parameters = sum(math.prod(shape) for name, (_, shape, _, _) in self.places.items() if name in self.weights)
        return WeightsRecord(file=file, dtype=precision, tensors=len(self.places), parameters=parameters)


def store(
    weights: Mapping[str, Tensor],
    path: Path,
    precision: Precision,
    quantized: Mapping[str, Tensor] | None = None,
    kept: Collection[str] = (),
) -> StoredWeights:
    """Write weights in a precision.

    Args:
        weights: the weights by their canonical names.
        path: the file to write.
        precision: the precision of floating tensors; `int8` stores them as half.
        quantized: tensors that are stored unchanged, in place of the weights of the same names or in addition to them.
        kept: names of the weights that are stored as float32 in every precision, because half cannot hold them
            (`precision.select_float32_weights`).
    """
    quantized = quantized or {}
    floats = {name: weight for name, weight in weights.items() if name not in quantized}
    dtypes = {name: torch.float32 if name in kept else _TORCH_DTYPES[precision] for name in floats}
    tensors = {name: weight.to(dtypes[name]).contiguous() for name, weight in floats.items()}
    tensors |= {name: tensor.contiguous() for name, tensor in quantized.items()}
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)  # safetensors creates files that only their owner can read
    return StoredWeights(path=path, weights=frozenset(weights), places=_places(path))


def _places(path: Path) -> dict[str, tuple[ir.DataType, tuple[int, ...], int, int]]:
    with path.open("rb") as stream:
        header = read_header(stream, path.stat().st_size)
    return {
        name: (ir.DataType(WEIGHT_TYPES[place.dtype]), place.shape, place.start, place.end - place.start)
        for name, place in header.tensors.items()
    }

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
from torch import Tensor

from latentrt.bundle.manifest import Precision, WeightsRecord
from latentrt.bundle.onnx_types import WEIGHT_TYPES
from latentrt.bundle.safetensors_header import read_header
from latentrt_export.checkpoints.safetensors_writer import SafetensorsWriter
from latentrt_export.checkpoints.stored_tensor import StoredTensor
from latentrt_export.modules.streamed import WeightsByName

__all__ = ["StoredWeights", "store"]

# Of floating tensors, by the names in a file; an int8 component stores those that are not quantised as half.
_STORED_AS = {"float16": "F16", "float32": "F32", "int8": "F16"}
_DTYPES = {"F16": torch.float16, "F32": torch.float32}
_NAMES_IN_TORCH = {torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32"}  # of what quantisation makes
_NAMES = {ir.DataType(code): name for name, code in WEIGHT_TYPES.items()}


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

    def read(self, name: str) -> Tensor:
        """Read one tensor, float32 where it is floating."""
        dtype, shape, offset, length = self.places[name]
        place = StoredTensor(file=self.path, dtype=_NAMES[dtype], shape=shape, start=offset, end=offset + length)
        return place.load()

    def record(self, file: str, precision: Precision) -> WeightsRecord:
        """Return the manifest's record of the file, with the path `file` in the bundle."""
        parameters = sum(math.prod(shape) for name, (_, shape, _, _) in self.places.items() if name in self.weights)
        return WeightsRecord(file=file, dtype=precision, tensors=len(self.places), parameters=parameters)


def store(
    weights: WeightsByName,
    path: Path,
    precision: Precision,
    quantized: Mapping[str, Tensor] | None = None,
    kept: Collection[str] = (),
) -> StoredWeights:
    """Write weights in a precision, one tensor at a time.

    Args:
        weights: the weights by their canonical names.
        path: the file to write.
        precision: the precision of floating tensors; `int8` stores them as half.
        quantized: tensors that are stored unchanged, in place of the weights of the same names or in addition to them.
        kept: names of the weights that are stored as float32 in every precision, because half cannot hold them
            (`precision.select_float32_weights`).
    """
    quantized = quantized or {}
    entries = {name: (_NAMES_IN_TORCH[each.dtype], tuple(each.shape)) for name, each in quantized.items()}
    for name in weights:
        dtype = "F32" if name in kept else _STORED_AS[precision]
        entries.setdefault(name, (dtype, weights.shape(name)))
    with SafetensorsWriter(path, entries, {"format": "pt"}) as writer:
        for name in writer.names:
            tensor = quantized[name] if name in quantized else weights[name].to(_DTYPES[entries[name][0]])
            writer.write(name, tensor.contiguous().flatten().view(torch.uint8).numpy())
    return StoredWeights(path=path, weights=frozenset(weights), places=_places(path))


def _places(path: Path) -> dict[str, tuple[ir.DataType, tuple[int, ...], int, int]]:
    with path.open("rb") as stream:
        header = read_header(stream, path.stat().st_size)
    return {
        name: (ir.DataType(WEIGHT_TYPES[place.dtype]), place.shape, place.start, place.end - place.start)
        for name, place in header.tensors.items()
    }

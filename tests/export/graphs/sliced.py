"""A decoder's graph cut into slices, on disk, and what runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from latentrt.bundle.manifest import GraphRecord, Part, PartName
from latentrt.bundle.tensors import TensorSpec
from latentrt.decode.slices import SlicedDecoder
from latentrt_export.graphs.slices_maker import SlicesMaker
from latentrt_export.graphs.trace import OPSET

LATENTS = (TensorSpec("latents", "float32", ("batch", 4, "height", "width")),)


@dataclass(frozen=True)
class Sliced:
    """The maker that wrote the parts."""

    maker: SlicesMaker

    @property
    def parts(self) -> dict[PartName, Part]:
        return self.maker.parts

    @property
    def folder(self) -> Path:
        return self.maker.folder

    def decoder(self) -> SlicedDecoder:
        """The decoder in slices, on ONNX Runtime."""
        return self.maker.decoder()


def sliced(model: ir.Model, folder: Path, told: Callable[[str], None] = lambda text: None) -> Sliced:
    """Cut a graph. Its weights lie in the folder."""
    maker = SlicesMaker(inputs=LATENTS, folder=folder, prefix="vae_decoder/", phase=told)
    record = GraphRecord(file="vae_decoder/model.float32.onnx", opset=OPSET, nodes=len(model.graph))
    maker.make(model, record, "float32", [])
    return Sliced(maker)

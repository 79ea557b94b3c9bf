"""The parts of a decoder for decoding in slices: their files, their records, and the proof that they make its pixels.

They are run as a picture's are (`latentrt.sliced_decoder`), with bands as low as those of a picture, and the pixels are
compared with the whole graph's. A sum over bands is in another order than one over everything, which is seen where a
value sits on the edge between two levels: one level is the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.errors import GateError
from latentrt.gate import difference, words
from latentrt.manifest import GateFigure, GraphRecord, Part, PartName, Precision
from latentrt.session import Arrays
from latentrt.sliced_decoder import SlicedDecoder
from latentrt.tensors import DType, TensorSpec
from latentrt_export.onnxruntime_cpu import Graph
from latentrt_export.parts import Run
from latentrt_export.slices import slice_decoder

__all__ = ["SlicesMaker"]

_BOUND = 1
_DTYPES: dict[ir.DataType | None, DType] = {ir.DataType.FLOAT: "float32", ir.DataType.UINT8: "uint8"}


@dataclass(kw_only=True)
class SlicesMaker:
    """Cuts a decoder's float32 graph; other graphs are left whole, as slices are for CPUs.

    Attributes:
        inputs: of the whole decoder.
        folder: where the files go, beside the weights.
        prefix: what the bundle calls the folder (`vae_decoder/`).
        phase: told what is being done.
        parts: what has been made, as the manifest will have it.
    """

    inputs: tuple[TensorSpec, ...]
    folder: Path
    prefix: str
    phase: Callable[[str], None]
    parts: dict[PartName, Part] = field(default_factory=dict)

    def make(self, model: ir.Model, whole: GraphRecord, precision: Precision, runs: Iterable[Run]) -> None:
        """Cut one graph, write its parts beside it and judge them.

        Args:
            model: the finished graph.
            whole: its record. A part's file is called as it is, with the part's name in place of `model`.
            precision: what it computes in.
            runs: what the parts together are compared with.

        Raises:
            GateError: the pixels miss their bound. ExportError: the graph cannot be cut.
        """
        if precision != "float32":
            return
        self.phase(f"checking the slices of the {precision} graph")
        for name, part in slice_decoder(model).items():
            file = Path(whole.file).name.replace("model", name, 1)
            ir.save(part, self.folder / file)
            record = GraphRecord(file=f"{self.prefix}{file}", opset=whole.opset, nodes=len(part.graph))
            inputs, outputs = _specs(part.graph.inputs), _specs(part.graph.outputs)
            self.parts[name] = Part(inputs=inputs, outputs=outputs, graphs={precision: record})
        # Of all of them together, so the last one, which makes the pixels, says it.
        self.parts[name] = _with_gate(self.parts[name], precision, tuple(map(self._judge, runs)))

    def decoder(self) -> SlicedDecoder:
        """The parts that were made, as a runtime runs them."""
        return SlicedDecoder(self.inputs, self.parts, self._open)

    def _judge(self, run: Run) -> GateFigure:
        reference, found = run.outputs["pixels"], self.decoder().run(run.feeds)["pixels"]
        figure = difference(reference, found, "levels")
        shapes = {name: array.shape for name, array in run.feeds.items()}
        if not figure <= _BOUND:
            wrong = words(reference, found, figure, "levels", "its own")
            raise GateError(
                f"the float32 graph and its slices: pixels {wrong} for inputs of shape {shapes}; "
                f"the bound is {_BOUND}. No bundle was written; --no-parts leaves the slices out"
            )
        return GateFigure(output="pixels", shapes=shapes, measure="levels", figure=figure, bound=_BOUND)

    def _open(self, name: PartName) -> _OpenPart:
        (record,) = self.parts[name].graphs.values()
        return _OpenPart(self.parts[name].inputs, Graph(self.folder / Path(record.file).name))


@dataclass(frozen=True)
class _OpenPart:
    """A part, as `latentrt.session.Session` has it."""

    inputs: tuple[TensorSpec, ...]
    graph: Graph

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return self.graph.run(feeds)


def _specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(str(value.name), _DTYPES[value.dtype], tuple(_size(size) for size in value.shape or ()))
        for value in values
    )


def _size(size: int | ir.SymbolicDim) -> int | str:
    return size if isinstance(size, int) else str(size.value)


def _with_gate(part: Part, precision: Precision, gate: tuple[GateFigure, ...]) -> Part:
    record = part.graphs[precision]
    judged = GraphRecord(file=record.file, opset=record.opset, nodes=record.nodes, gate=gate)
    return Part(inputs=part.inputs, outputs=part.outputs, graphs={precision: judged})

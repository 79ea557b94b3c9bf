"""The parts of a decoder for decoding in slices: their files, their records, and the proof that they make its pixels.

They are run as a picture's are (`latentrt.decode.slices`), with bands as low as those of a picture, and judged
(`slices_gate.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.backends.session import Arrays, Session
from latentrt.bundle.manifest import GateResult, GraphRecord, Part, PartName, Precision
from latentrt.bundle.tensors import DType, TensorSpec
from latentrt.decode.slices import SlicedDecoder
from latentrt_export.gates.slices_gate import judge_pixels, judge_stages, without_rounding
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.parts import Run
from latentrt_export.graphs.slices import cuts, slice_decoder

__all__ = ["SlicesMaker"]

# What files without rounding are called, for as long as they are needed.
_EXACT = "exact."
_DTYPES: dict[ir.DataType | None, DType] = {ir.DataType.FLOAT: "float32", ir.DataType.UINT8: "uint8"}


@dataclass(kw_only=True)
class SlicesMaker:
    """Cuts a decoder's float32 or int8 graph; half graphs are left whole, as slices are for CPUs.

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
            GateError: the pixels miss their bound, or a stage its own. ExportError: the graph cannot be cut.
        """
        if precision == "float16":
            return
        self.phase(f"checking the slices of the {precision} graph")
        parts = slice_decoder(model)
        for name, part in parts.items():
            ir.save(part, self.folder / self._file(whole, name))
            file = f"{self.prefix}{self._file(whole, name)}"
            record = GraphRecord(file=file, opset=whole.opset, nodes=len(part.graph))
            inputs, outputs = _specs(part.graph.inputs), _specs(part.graph.outputs)
            self.parts[name] = Part(inputs=inputs, outputs=outputs, graphs={precision: record})
        last = [*parts][-1]  # which makes the pixels, so it says what is of all of them together
        if precision == "float32":
            figures = {last: judge_pixels("float32 graph", self.decoder(), runs)}
        else:
            runs = tuple(runs)
            figures = self._judge_stages(model, whole, runs)
            exact = self._judge_without_rounding(model, parts, whole, runs)
            figures[last] = (*figures.get(last, ()), *exact)
        for name, each in figures.items():
            self.parts[name] = _with_gate(self.parts[name], precision, each)

    def decoder(self, prefix: str = "", *, as_it_stands: bool = False) -> SlicedDecoder:
        """The parts that were made, as a runtime runs them, or with nothing folded; `prefix` is that of other files."""
        return SlicedDecoder(
            self.inputs,
            (),
            self.parts,
            lambda name: self._open(name, prefix, as_it_stands=as_it_stands),
            lambda name: None,
        )

    def _judge_stages(
        self, model: ir.Model, whole: GraphRecord, runs: Iterable[Run]
    ) -> dict[PartName, tuple[GateResult, ...]]:
        place = self.folder / f"values.{Path(whole.file).name}"
        return judge_stages(model, place, cuts(model), self.decoder(as_it_stands=True), runs)

    def _judge_without_rounding(
        self, model: ir.Model, parts: dict[PartName, ir.Model], whole: GraphRecord, runs: Iterable[Run]
    ) -> tuple[GateResult, ...]:
        files = {self._file(whole, name): part for name, part in parts.items()} | {Path(whole.file).name: model}
        places = {file: self.folder / f"{_EXACT}{file}" for file in files}
        try:
            for file, each in files.items():
                ir.save(without_rounding(each), places[file])
            graph = Graph(places[Path(whole.file).name])
            exact = [Run(run.feeds, graph.run(run.feeds)) for run in runs]
            del graph
            return judge_pixels("int8 graph without its rounding", self.decoder(_EXACT), exact)
        finally:
            for place in places.values():
                place.unlink(missing_ok=True)

    def _file(self, whole: GraphRecord, name: PartName) -> str:
        return Path(whole.file).name.replace("model", name, 1)

    def _open(self, name: PartName, prefix: str, *, as_it_stands: bool) -> _OpenPart:
        (record,) = self.parts[name].graphs.values()
        graph = Graph(self.folder / f"{prefix}{Path(record.file).name}", as_it_stands=as_it_stands)
        return _OpenPart(self.parts[name].inputs, self.parts[name].outputs, graph)


@dataclass(frozen=True)
class _OpenPart(Session):
    """A part on ONNX Runtime."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
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


def _with_gate(part: Part, precision: Precision, gate: tuple[GateResult, ...]) -> Part:
    record = part.graphs[precision]
    judged = GraphRecord(file=record.file, opset=record.opset, nodes=record.nodes, gate=gate)
    return Part(inputs=part.inputs, outputs=part.outputs, graphs={precision: judged})

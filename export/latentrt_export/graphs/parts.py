"""The parts of a graph for a CPU: their files, their records, and the proof that together they are the whole.

The bounds, by what the whole graph computes in. It is compared with its own parts on the same inputs, all on ONNX
Runtime, so that nothing differs but where it was cut:

* float32: a cut moves no arithmetic, and computed as it stands each graph gives the same bits as its parts
  (`tests/export/graphs/test_division.py`). ONNX Runtime folds a scale into the product behind it, unless a cut lies
  between: 1.3e-6 of the largest value seen on tiny random checkpoints, 1.0e-6 on a full-size one. Self-attention is one
  operator in the parts, which sums in blocks: that is within those figures.
* int8: a difference in the last bit becomes a step of a quantised value where that is on the edge between two, and
  later layers make more of it: 5.6e-2 seen on a full-size one, which is no more than the graph's own rounding, drawn
  anew. So both are computed as they stand, nothing folded, and should be the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from latentrt.bundle.gate import difference, message
from latentrt.bundle.manifest import GateResult, GraphRecord, Part, PartName, Precision
from latentrt.errors import ExportError, GateError
from latentrt_export.gates.merging_gate import open_told
from latentrt_export.graphs.division import divide, signature
from latentrt_export.graphs.passes.one_attention import FuseSelfAttention
from latentrt_export.modules.module import Arrays

__all__ = ["MakesParts", "PartsMaker", "Run"]

_BOUND = 1e-5


@dataclass(frozen=True)
class Run:
    """One set of inputs, what torch or the whole graph makes of it, and what was chosen on the way."""

    feeds: Arrays
    outputs: Arrays
    choices: Arrays = field(default_factory=dict)


class MakesParts(Protocol):
    """What cuts a submodule's graphs into parts, one after the other as they are finished."""

    parts: dict[PartName, Part]

    def make(self, model: ir.Model, whole: GraphRecord, precision: Precision, runs: Iterable[Run]) -> None:
        """Cut one graph, write its parts beside it, judge them and put their records into `parts`."""


@dataclass(kw_only=True)
class PartsMaker:
    """Divides a submodule's float32 or int8 graph; half graphs are left whole, as parts are for CPUs.

    Attributes:
        alone: the inputs that leave the loop, and the part that each becomes.
        deep_cache: the branch of a part `shallow`, None for no such part.
        folder: where the files go, beside the weights.
        prefix: what the bundle calls the folder (`unet/`).
        phase: told what is being done.
        parts: what has been made, as the manifest will have it.
    """

    alone: Mapping[str, PartName]
    deep_cache: int | None
    folder: Path
    prefix: str
    phase: Callable[[str], None]
    parts: dict[PartName, Part] = field(default_factory=dict)

    def make(self, model: ir.Model, whole: GraphRecord, precision: Precision, runs: Iterable[Run]) -> None:
        """Divide one graph, write its parts beside it and judge them.

        Args:
            model: the finished graph.
            whole: its record. A part's file is called as it is, with the part's name in place of `model`.
            precision: what it computes in.
            runs: what the parts together are compared with.

        Raises:
            RequestError: there is no such branch to cut `shallow` at.
            GateError: a part misses its bound.
            ExportError: the graph cannot be divided.
        """
        if precision == "float16":
            return
        self.phase(f"checking the parts of the {precision} graph")
        if precision == "float32":  # the whole is TensorRT's as well, and stays as it is
            model = model.clone()
            FuseSelfAttention()(model)
        else:
            runs = _as_they_stand(model, self.folder / Path(whole.file).name, runs)
        try:
            models = divide(model, self.alone, self.deep_cache)
        except ExportError as error:
            raise ExportError(
                f"the denoiser cannot be divided: {error}. No bundle was written; --no-parts leaves the parts out"
            ) from error
        files = {name: Path(whole.file).name.replace("model", name, 1) for name in models}
        for name, part in models.items():
            ir.save(part, self.folder / files[name])
        gates = self._judge(models, files, precision, [*runs])
        for name, part in models.items():
            file = f"{self.prefix}{files[name]}"
            record = GraphRecord(file=file, opset=whole.opset, nodes=len(part.graph), gate=gates[name])
            inputs, outputs = tuple(signature(part.graph.inputs)), tuple(signature(part.graph.outputs))
            self.parts[name] = Part(inputs=inputs, outputs=outputs, graphs={precision: record})

    def _judge(
        self, models: Mapping[PartName, ir.Model], files: Mapping[PartName, str], precision: Precision, runs: list[Run]
    ) -> dict[PartName, tuple[GateResult, ...]]:
        """The figures of each part: of those that make up the whole, beside it; of `shallow`, beside `loop`.

        One graph is open at a time, so that this needs no more memory than the whole did.
        """
        values = [{**run.feeds, **run.choices} for run in runs]
        pieces: tuple[PartName, ...] = (*self.alone.values(), "body")
        for name in pieces:
            self._run(models[name], files[name], precision, values)
        composed = tuple(_figures("its parts together", precision, runs, values))
        gates = dict.fromkeys(pieces, composed)
        if "shallow_body" in models:
            loop = [
                Run(run.feeds, {name: made[name] for name in run.outputs})
                for run, made in zip(runs, values, strict=True)
            ]
            self._run(models["shallow_body"], files["shallow_body"], precision, values)
            gates["shallow_body"] = tuple(_figures("its shallow part", precision, loop, values))
        return gates

    def _run(self, model: ir.Model, file: str, precision: Precision, values: list[Arrays]) -> None:
        """Run a part on what is there, and put what it makes there too."""
        graph, choices = open_told(model, self.folder / file, as_it_stands=precision == "int8")
        names = [*(str(value.name) for value in model.graph.inputs), *choices]
        for known in values:
            known.update(graph.run({name: known[name] for name in names}))


def _as_they_stand(model: ir.Model, path: Path, runs: Iterable[Run]) -> list[Run]:
    """The same inputs, and what the whole graph makes of them with nothing folded."""
    graph, _ = open_told(model, path, as_it_stands=True)
    found = [(run, graph.run({**run.feeds, **run.choices})) for run in runs]
    return [Run(run.feeds, {name: made[name] for name in run.outputs}, run.choices) for run, made in found]


def _figures(what: str, precision: Precision, runs: Iterable[Run], values: Iterable[Arrays]) -> Iterator[GateResult]:
    for run, found in zip(runs, values, strict=True):
        shapes = {name: array.shape for name, array in run.feeds.items()}
        for output, reference in run.outputs.items():
            figure = difference(reference, found[output], "relative")
            if not figure <= _BOUND:
                wrong = message(reference, found[output], figure, "relative", "its own")
                raise GateError(
                    f"the {precision} graph and {what}: {output} {wrong} for inputs of shape {shapes}; "
                    f"the bound is {_BOUND:g}. No bundle was written; --no-parts leaves the parts out"
                )
            yield GateResult(output=output, shapes=shapes, metric="relative", value=figure, bound=_BOUND)

"""Splits a denoiser's graph, so that values which do not change from step to step are computed once.

- `time_embedding` computes the values that depend on the timestep alone (every residual block's `time_emb_proj`), or
  also on a distilled guidance, for a whole schedule in one batch if needed.
- `cross_attention_kv` computes those that depend on the text embeddings alone (the keys and values of every
  cross-attention).
- `body` computes the rest, from the latents and the outputs of both.
- `shallow_body` is `body` with the deep features of an earlier step as an input (`deep_cache`).

The parts are extracted from a finished graph of any precision. The values between them are float32. Their first axis
counts evaluations, and timesteps in `time_embedding`. `body` and `shallow_body` expect as many rows of each as of the
latents; a runtime repeats or gathers rows. ONNX Runtime also broadcasts a single row, which other backends need not do.

The bounds, by the precision in which the whole graph computes. It is compared with its own parts on the same inputs,
all on ONNX Runtime, so that nothing differs but the split:

* float32: splitting moves no arithmetic, and without optimisation the parts give the same bits as the whole
  (`tests/export/graphs/test_split.py`). ONNX Runtime folds a scale into the product behind it unless a split separates
  them: 1.3e-6 of the largest value seen on tiny random checkpoints, 1.0e-6 on a full-size one. Self-attention is one
  operator in the parts, which sums in blocks: within the same differences.
* int8: a difference in the last bit becomes a whole step of a quantised value that is on the edge between two, which
  later layers amplify: 5.6e-2 seen on a full-size one, no more than the graph's own rounding error. So both run without
  optimisation, where they agree to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from latentrt.bundle.manifest import GateResult, GraphRecord, Part, PartName, Precision
from latentrt.bundle.tensors import DType, TensorSpec
from latentrt.errors import ExportError
from latentrt_export.gates.token_merging import force_decisions
from latentrt_export.gates.verify import Run, check_output
from latentrt_export.graphs.deep_cache import DEEP_FEATURES, find_deep_features
from latentrt_export.graphs.part_writer import PartWriter, StructureError
from latentrt_export.graphs.passes.fuse_self_attention import FuseSelfAttention
from latentrt_export.graphs.segments import SegmentedGraph
from latentrt_export.graphs.subgraph import boundary_values, extract_subgraph
from latentrt_export.modules.module import Arrays

__all__ = ["SplitWriter", "describe_values", "split_denoiser"]

_BOUND = 1e-5
# Descriptive names for the outputs of cross-attention's projections.
_OUTPUT_NAMES = {"to_k": "keys", "to_v": "values"}


def split_denoiser(
    model: ir.Model, loop_invariant_inputs: Mapping[str, PartName], deep_cache: int | None = None
) -> dict[PartName, ir.Model]:
    """Split a denoiser's finished graph into its parts.

    Args:
        model: the whole; not modified. The parts share its tensors.
        loop_invariant_inputs: input → the part that computes the values depending on it, and on other inputs of that
            part, alone.
        deep_cache: the branch at which `shallow_body` is split off; None omits that part.

    Returns:
        The parts by name. Their inputs and outputs are float32, and their axes have sizes or names.

    Raises:
        RequestError: the denoiser has no such branch.
        ExportError: the graph does not have the structure of a denoiser.
    """
    parts: dict[PartName, ir.Model] = {}
    inputs: dict[str, TensorSpec] = {}
    for part in dict.fromkeys(loop_invariant_inputs.values()):
        names = [name for name, each in loop_invariant_inputs.items() if each == part]
        outputs = _name_outputs(model, boundary_values(model, names))
        parts[part] = extract_subgraph(model, keep_inputs=names, inputs={}, outputs=outputs)
        ShapeInferencePass()(parts[part])
        inputs.update(zip(outputs, describe_values(parts[part].graph.outputs), strict=True))
        if part == "time_embedding":  # one row for each timestep of a schedule, not for each evaluation
            _rename_first_axis(parts[part], "timesteps")
    rest = [str(value.name) for value in model.graph.inputs if value.name not in loop_invariant_inputs]
    outputs = {str(value.name): str(value.name) for value in model.graph.outputs}
    if deep_cache is None:
        return {**parts, "body": extract_subgraph(model, keep_inputs=rest, inputs=inputs, outputs=outputs)}
    deep = find_deep_features(model, deep_cache)
    with_deep = {**outputs, str(deep.name): DEEP_FEATURES}
    parts["body"] = extract_subgraph(model, keep_inputs=rest, inputs=inputs, outputs=with_deep)
    features = parts["body"].graph.outputs[-1]
    features.shape = _name_sides(features)
    inputs[str(deep.name)] = next(describe_values([features]))
    return {**parts, "shallow_body": extract_subgraph(model, keep_inputs=rest, inputs=inputs, outputs=outputs)}


def describe_values(values: Iterable[ir.Value]) -> Iterator[TensorSpec]:
    """Describe the inputs or outputs of a part.

    Raises:
        ExportError: an axis has neither a size nor a name, the first one has no name, or the values are no numbers that
            a part exchanges.
    """
    for value in values:
        shape, dtype = tuple(_size(size) for size in value.shape or ()), _DTYPES.get(value.dtype)
        if not shape or isinstance(shape[0], int) or "" in shape or dtype is None:
            raise ExportError(
                f"got {value.name} of shape {value.shape} and type {value.dtype}, expected a name for the first axis, "
                "a size or a name for the others, and float32 or int64"
            )
        yield TensorSpec(str(value.name), dtype, shape)


def _size(size: int | ir.SymbolicDim) -> int | str:
    return size if isinstance(size, int) else size.value or ""


def _rename_first_axis(part: ir.Model, name: str) -> None:
    """Rename the first axis of a part's inputs and outputs, and that axis wherever else it occurs."""
    values = [*part.graph.inputs, *(value for node in part.graph for value in node.outputs)]
    former = _size(values[0].shape[0]) if values[0].shape else ""
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(name if _size(size) == former else size for size in value.shape)


def _name_sides(features: ir.Value) -> ir.Shape:
    """Name the height and width of features of a deeper level, which the tracer writes as formulas."""
    sides = {2: "deep_height", 3: "deep_width"}
    sizes = enumerate(_size(size) for size in features.shape or ())
    return ir.Shape(size if isinstance(size, int) or size.isidentifier() else sides[axis] for axis, size in sizes)


def _name_outputs(model: ir.Model, values: Iterable[ir.Value]) -> dict[str, str]:
    """Name each value between parts after the module whose weight produced it: value → name.

    Several values of one module, such as the scale and the shift of a residual block, are numbered: `….1`, `….2`.
    """
    modules = {name.removesuffix(".weight") for name in model.graph.initializers if name.endswith(".weight")}
    names: dict[str, str] = {}
    modules_used: Counter[str] = Counter()
    for value in values:
        path, _, last = _find_module(value, modules).rpartition(".")
        name = ".".join(filter(None, [path, _OUTPUT_NAMES.get(last, last)]))
        number = modules_used[name]
        modules_used[name] += 1
        names[str(value.name)] = f"{name}.{number}" if number else name
    return names


def _find_module(value: ir.Value, modules: set[str]) -> str:
    """Return the module of the nearest node, searching backwards, that belongs to one with a weight."""
    nodes = [value.producer()]
    for node in nodes:  # grows while it is searched
        if node is not None:
            scope = str(node.name).rpartition("/")[0]
            if scope in modules:
                return scope
            nodes += [source.producer() for source in node.inputs if source is not None]
    raise ExportError(f"got {value.name} between parts, expected a value that a module's weight produced")


# An upscaler's noise level is a whole number.
_DTYPES: dict[ir.DataType | None, DType] = {ir.DataType.FLOAT: "float32", ir.DataType.INT64: "int64"}


@dataclass(kw_only=True)
class SplitWriter(PartWriter):
    """A writer that splits a denoiser's float32 or int8 graph.

    Attributes:
        loop_invariant_inputs, deep_cache: as `split_denoiser`, whose errors `write` raises as well.
    """

    drawback: ClassVar[str] = (
        "on a CPU every step computes the time embedding and the keys and values of the prompt again, and DeepCache is "
        "not available"
    )
    loop_invariant_inputs: Mapping[str, PartName]
    deep_cache: int | None

    def _write(self, model: ir.Model, whole: GraphRecord, precision: Precision, runs: Iterable[Run]) -> None:
        self.notify(f"checking the parts of the {precision} graph")
        if precision == "float32":  # the whole graph is also TensorRT's, which lacks the operator, and stays as it is
            model = model.clone()
            FuseSelfAttention()(model)
        else:
            runs = _run_unoptimized(model, self.folder, runs)
        try:
            models = split_denoiser(model, self.loop_invariant_inputs, self.deep_cache)
            signatures = {
                name: (tuple(describe_values(part.graph.inputs)), tuple(describe_values(part.graph.outputs)))
                for name, part in models.items()
            }
        except ExportError as error:
            needs = ", as `deep_cache` needs; leave that out" if self.required else ""
            raise StructureError(f"the denoiser cannot be split ({error}){needs}") from error
        files = {name: self.file_name(whole, name) for name in models}
        for name, part in models.items():
            ir.save(part, self.folder / files[name])
        gates = self._compare(models, files, precision, [*runs])
        for name, part in models.items():
            file = f"{self.component}/{files[name]}"
            record = GraphRecord(file=file, opset=whole.opset, nodes=len(part.graph), gate=gates[name])
            inputs, outputs = signatures[name]
            self.parts[name] = Part(inputs=inputs, outputs=outputs, graphs={precision: record})

    def _compare(
        self, models: Mapping[PartName, ir.Model], files: Mapping[PartName, str], precision: Precision, runs: list[Run]
    ) -> dict[PartName, tuple[GateResult, ...]]:
        """Compare the parts together with the whole graph, and `shallow_body` with `body`.

        One segment is open at a time, so that this takes no more memory than the whole graph did.
        """
        values = [{**run.feeds, **run.forced} for run in runs]
        pieces: tuple[PartName, ...] = (*self.loop_invariant_inputs.values(), "body")
        for name in pieces:
            self._run(files[name], precision, values)
        composed = tuple(_compare_outputs("its parts together", precision, runs, values))
        gates = dict.fromkeys(pieces, composed)
        if "shallow_body" in models:
            body = [
                Run(run.feeds, {name: outputs[name] for name in run.outputs})
                for run, outputs in zip(runs, values, strict=True)
            ]
            for run, outputs in zip(runs, values, strict=True):
                for name in run.outputs:
                    del outputs[name]  # of `body`, so that it is not compared with itself
            self._run(files["shallow_body"], precision, values)
            gates["shallow_body"] = tuple(_compare_outputs("its shallow body", precision, body, values))
        return gates

    def _run(self, file: str, precision: Precision, values: list[Arrays]) -> None:
        """Run a part on each set of values and add its outputs to the set."""
        forced, _ = force_decisions(ir.load(self.folder / file))
        graph = SegmentedGraph(forced, self.folder, optimize=precision != "int8")
        for each, outputs in zip(values, graph.run_all(values), strict=True):
            each.update(outputs)


def _run_unoptimized(model: ir.Model, folder: Path, runs: Iterable[Run]) -> list[Run]:
    """Run the whole graph without optimisation on the inputs of `runs`."""
    runs = list(runs)
    graph = SegmentedGraph(force_decisions(model)[0], folder, optimize=False)
    found = graph.run_all({**run.feeds, **run.forced} for run in runs)
    return [
        Run(run.feeds, {name: outputs[name] for name in run.outputs}, run.forced)
        for run, outputs in zip(runs, found, strict=True)
    ]


def _compare_outputs(
    what: str, precision: Precision, runs: Iterable[Run], values: Iterable[Arrays]
) -> Iterator[GateResult]:
    for run, found in zip(runs, values, strict=True):
        for output, reference in run.outputs.items():
            yield check_output(
                f"the {precision} graph and {what}",
                output,
                reference,
                found.get(output),
                "relative",
                _BOUND,
                feeds=run.feeds,
                reference_name="its own",
                advice="pass `parts=False`",
            )

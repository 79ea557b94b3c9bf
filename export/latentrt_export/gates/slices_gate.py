"""Do the slices of a decoder make what the whole graph makes?

Floats: the pixels of a decode in slices beside the whole's. A sum over bands is in another order than one over
everything, which is seen where a value sits on the edge between two levels: one level is the bound.

int8: there the last bit of a norm's sum decides now and then which of two integers a value becomes, and what follows
from that decides others, so that in the end the rounding is drawn anew, as it is by another backend. So two things are
asked. Without the rounding of activations the pixels are to be the whole's, as they are for floats. And with it each
stage by itself, on what the whole graph gave it, with nothing folded: a few values are then a step off. By the RMS of
the difference over that of the output, 4e-3 was seen (full size, random weights).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from latentrt.bundle.gate import difference, message
from latentrt.bundle.manifest import GateMetric, GateResult, PartName
from latentrt.decode.slices import SlicedDecoder
from latentrt.errors import GateError
from latentrt_export.gates.verify import too_many_off
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.graphs.parts import Run
from latentrt_export.graphs.slices import Cut
from latentrt_export.modules.module import Arrays

__all__ = ["judge_pixels", "judge_stages", "without_rounding"]

_LEVELS = 1
_STAGE_RMS = 0.02


def judge_pixels(graph: str, decoder: SlicedDecoder, runs: Iterable[Run]) -> tuple[GateResult, ...]:
    """The figures of a decoder of floats.

    Args:
        graph: which one that is, in words.
        decoder: the parts.
        runs: what the whole makes.

    Raises:
        GateError: the pixels miss their bound.
    """
    return tuple(
        _figure(graph, "pixels", "levels", _LEVELS, run.feeds, run.outputs, decoder.run(run.feeds)) for run in runs
    )


def judge_stages(
    model: ir.Model, path: Path, stages: Sequence[Cut], decoder: SlicedDecoder, runs: Iterable[Run]
) -> dict[PartName, tuple[GateResult, ...]]:
    """The figures of a decoder of int8: of what is before the stages (under `head`) and of each stage.

    Args:
        model: the whole. Left as it was.
        path: a scratch file beside the weights; removed again.
        stages: what they take and give of the whole's values.
        decoder: the parts, their graphs as they stand.
        runs: the inputs.

    Raises:
        GateError: a stage misses its bound.
    """
    found: dict[PartName, list[GateResult]] = {}
    whole = _with_values(model, path, stages)
    for run in runs:
        values = whole.run(run.feeds)
        for name, figure in _judged(run.feeds, values, stages, decoder):
            found.setdefault(name, []).append(figure)
    return {name: tuple(figures) for name, figures in found.items()}


def without_rounding(model: ir.Model) -> ir.Model:
    """A copy of a graph whose activations stay floats."""
    model = model.clone()
    for node in tuple(model.graph):
        source = node.inputs[0] if node.op_type == "QuantizeLinear" else None
        if source is not None:
            for use in tuple(node.outputs[0].uses()):
                _read_unrounded(model.graph, use.node.outputs[0], source)
    RemoveUnusedNodesPass()(model)
    return model


def _read_unrounded(graph: ir.Graph, rounded: ir.Value, source: ir.Value) -> None:
    if rounded.is_graph_output():
        index = [*graph.outputs].index(rounded)
        rounded.name, source.name, source.shape = f"{rounded.name}/rounded", rounded.name, rounded.shape
        graph.outputs[index] = source
    ir.convenience.replace_all_uses_with(rounded, source)


def _judged(
    feeds: Arrays, values: Arrays, stages: Sequence[Cut], decoder: SlicedDecoder
) -> Iterator[tuple[PartName, GateResult]]:
    first = stages[0].takes
    before = {first: decoder.before_stages(feeds["latents"])}
    yield "head", _figure("int8 graph", first, "rms", _STAGE_RMS, feeds, values, before)
    for number, stage in enumerate(stages):
        residual = values[stage.residual].copy() if stage.residual is not None else None
        shape = feeds["latents"].shape
        result = {stage.gives: decoder.run_stage(number, shape, values[stage.takes].copy(), residual)}
        name: PartName = f"slice.{number}"
        yield name, _figure("int8 graph", stage.gives, "rms", _STAGE_RMS, feeds, values, result)


def _with_values(model: ir.Model, path: Path, stages: Iterable[Cut]) -> Graph:
    """The whole graph, which gives also what the stages take and give."""
    whole = model.clone()
    values = {str(value.name): value for node in whole.graph for value in node.outputs}
    wanted = {name for stage in stages for name in (stage.takes, stage.gives, stage.residual) if name is not None}
    given = {str(value.name) for value in whole.graph.outputs}
    whole.graph.outputs.extend(values[name] for name in sorted(wanted - given))
    ir.save(whole, path)
    try:
        return Graph(path, as_it_stands=True)
    finally:
        path.unlink(missing_ok=True)


def _figure(
    graph: str,
    output: str,
    measure: GateMetric,
    bound: float,
    feeds: Arrays,
    expected: Arrays,
    found: Arrays,
) -> GateResult:
    reference, result = expected[output], found[output]
    figure = difference(reference, result, measure)
    shapes = {name: array.shape for name, array in feeds.items()}
    if not figure <= bound:
        wrong = message(reference, result, figure, measure, "its own")
        raise GateError(
            f"the {graph} and its slices: {output} {wrong} for inputs of shape {shapes}; "
            f"the bound is {bound:g}. No bundle was written; --no-parts leaves the slices out"
        )
    if off := too_many_off(reference, result, measure, bound):
        raise GateError(
            f"the {graph} and its slices: {output} {off}, for inputs of shape {shapes}. No bundle was written; "
            "--no-parts leaves the slices out"
        )
    return GateResult(output=output, shapes=shapes, metric=measure, value=figure, bound=bound)

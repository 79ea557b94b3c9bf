"""Does a graph merge the tokens that torch merges?

Where two cosines are nearly the same, either choice is right, and the last bit of a sum decides. So a graph is told
what torch chose, and judged twice: what it makes of those choices is compared like everything else, and by the graph's
own cosines no choice, torch's or its own, may be worse than another by more than a bound. What cosines differ by is
what is allowed:

* float32: 3e-7 seen on a tiny random checkpoint; the bound is 1e-4.
* half rounds what enters the matching, which itself stays float32: 1.4e-3 seen; the bound is 2e-2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from latentrt.bundle.manifest import GateResult, Precision
from latentrt.errors import GateError
from latentrt_export.graphs.onnxruntime_cpu import Graph
from latentrt_export.token_merging_ratio import MATCHING

__all__ = ["judge_choices", "open_told"]

_BOUNDS: dict[Precision, float] = {"float32": 1e-4, "float16": 2e-2, "int8": 2e-2}
# What decides: where each token would go, and the order in which they go.
_DECISIONS = ("ArgMax", "TopK")
# What a graph would have decided itself, beside what it is told.
_OWN = "/own"


def open_told(model: ir.Model, path: Path, *, as_it_stands: bool = False) -> tuple[Graph, tuple[str, ...]]:
    """Open a graph that takes its matchings' decisions as inputs, and gives their cosines (`module/MatMul`) as well.

    Args:
        model: as it lies at `path`. Left as it was.
        as_it_stands: with nothing folded or fused.

    Returns:
        The graph, and the names of the inputs it has beside its own: `module/ArgMax`, `module/TopK`; what it would have
        decided itself is an output with `/own` behind that. Where nothing is decided, the graph as it is.
    """
    told = model.clone()
    names = [name for node in told.graph if (name := _told(told, node)) is not None]
    if not names:
        return Graph(path, as_it_stands=as_it_stands), ()
    RemoveUnusedNodesPass()(told)
    place = path.with_name(f"told.{path.name}")
    try:
        ir.save(told, place)
        return Graph(place, as_it_stands=as_it_stands), tuple(names)
    finally:
        place.unlink(missing_ok=True)


def judge_choices(
    component: str,
    precision: Precision,
    outputs: Mapping[str, NDArray[Any]],
    choices: Mapping[str, NDArray[Any]],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[GateResult]:
    """By a graph's own cosines, how much better another choice would be: a figure for each matching.

    Raises:
        GateError: by more than the bound.
    """
    figures = []
    for name in choices:
        matching, _, decision = name.rpartition("/")
        if decision != _DECISIONS[0]:
            continue
        cosines, places = outputs[f"{matching}/MatMul"], [f"{matching}/{each}" for each in _DECISIONS]
        bound = _BOUNDS[precision]
        theirs = [choices[place] for place in places]
        figure = _regret(cosines, *theirs)
        own = _regret(cosines, *(outputs[f"{place}{_OWN}"] for place in places))
        for whose, regret in (("torch's", figure), ("its own", own)):
            if not regret <= bound:
                raise GateError(
                    f"{component}: in the {precision} graph's {matching} another choice than {whose} would be better "
                    f"by {regret:.3g} for inputs of shape {dict(shapes)}; the bound is {bound:g}. No bundle was "
                    "written; leave --token-merging out, or export in float32"
                )
        cells = cosines.shape[2]
        if not np.array_equal(outputs[f"{places[1]}{_OWN}"][:, -cells:], theirs[1][:, -cells:]):
            raise GateError(
                f"{component}: the {precision} graph's {matching} has other destinations than torch for inputs of "
                f"shape {dict(shapes)}. No bundle was written; leave --token-merging out, or export in float32"
            )
        figures.append(GateResult(output=matching, shapes=dict(shapes), metric="absolute", value=figure, bound=bound))
    return figures


def _regret(cosines: NDArray[np.float32], cell: NDArray[np.int64], order: NDArray[np.int64]) -> float:
    """cosines: (B, N, D). cell: (B, N), where each token would go. order: (B, N), the destinations at its end."""
    best = cosines.max(axis=2)
    worse = best - np.take_along_axis(cosines, cell[..., None], axis=2)[..., 0]
    sources = np.take_along_axis(best, order[:, : order.shape[1] - cosines.shape[2]], axis=1)
    # In order they only fall; what they rise by above an earlier one was overlooked there.
    risen = sources - np.minimum.accumulate(sources, axis=1)
    return float(max(worse.max(initial=0.0), risen.max(initial=0.0)))


def _told(model: ir.Model, node: ir.Node) -> str | None:
    """Replace a decision by an input; its name."""
    matching = str(node.name).rpartition("/")[0]
    if node.op_type not in _DECISIONS or matching.rpartition(".")[2] != MATCHING:
        return None
    name, value = f"{matching}/{node.op_type}", node.outputs[-1]
    value.name = f"{name}{_OWN}"
    told = ir.Value(name=name, type=value.type, shape=value.shape)
    ir.convenience.replace_all_uses_with(value, told)
    model.graph.inputs.append(told)
    model.graph.outputs.append(value)
    if node.op_type == _DECISIONS[0] and node.inputs[0] is not None:
        node.inputs[0].name = f"{matching}/MatMul"
        model.graph.outputs.append(node.inputs[0])
    return name

"""Verifies that a graph merges the tokens that torch merges.

Where two cosines are nearly equal, either choice is valid and the last bit of a sum decides. So a graph gets torch's
decisions as inputs (it is *forced*) and is checked twice: its outputs are compared like any others, and by its own
cosines neither torch's decision nor its own may be worse than the best one by more than a bound. The bounds allow for
the difference of cosines:

* float32: 3e-7 was measured on a tiny random checkpoint; the bound is 1e-4.
* float16 rounds the input of the matching, which itself stays float32: 1.4e-3 was measured; the bound is 2e-2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from latentrt.bundle.manifest import GateResult, Precision
from latentrt.errors import GateError
from latentrt_export.token_merging_ratio import MATCHING

__all__ = ["check_matchings", "force_decisions"]

_BOUNDS: dict[Precision, float] = {"float32": 1e-4, "float16": 2e-2, "int8": 2e-2}
# The operators of the decisions: the destination of each token, and the order in which tokens are merged.
_DECISIONS = ("ArgMax", "TopK")
# Suffix of the outputs with a graph's own decisions.
_OWN = "/own"
_ADVICE = "No bundle was written; pass `token_merging=None` or `precision='float32'`"


def force_decisions(model: ir.Model) -> tuple[ir.Model, tuple[str, ...]]:
    """Return a graph that takes the decisions of its token matchings as inputs.

    Args:
        model: the graph; not modified.

    Returns:
        The graph, and the names of its added inputs: `module/ArgMax`, int64 [B, N], the destination of each token, and
        `module/TopK`, int64 [B, N], the order of merging. It has the added outputs `module/MatMul`, float32 [B, N, D],
        the cosines, and the graph's own decisions under the inputs' names with the suffix `/own`. A graph without token
        matchings is returned as it is, with no added names.
    """
    forced = model.clone()
    names = [name for node in forced.graph if (name := _force(forced, node)) is not None]
    if not names:
        return model, ()
    RemoveUnusedNodesPass()(forced)
    return forced, tuple(names)


def check_matchings(
    component: str,
    precision: Precision,
    outputs: Mapping[str, NDArray[Any]],
    forced: Mapping[str, NDArray[Any]],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[GateResult]:
    """Compare the decisions of token matchings by a graph's own cosines.

    Args:
        component, precision: the graph's; the precision selects the bound, and errors name both.
        outputs: the outputs of a graph of `force_decisions`.
        forced: torch's decisions, which were the graph's inputs.
        shapes: the shapes of the graph's inputs, for the results.

    Returns:
        A result for each matching: the difference between the best decision's cosine and that of torch's decision.

    Raises:
        GateError: torch's decision or the graph's own is worse than the best by more than the bound, their
            destinations differ, the cosines are not finite, or an array is missing or has another shape.
    """
    results = []
    for name in forced:
        matching, _, decision = name.rpartition("/")
        if decision != _DECISIONS[0]:
            continue
        cosines, nodes = outputs.get(f"{matching}/MatMul"), [f"{matching}/{each}" for each in _DECISIONS]
        bound = _BOUNDS[precision]
        torchs, own = [forced.get(node) for node in nodes], [outputs.get(f"{node}{_OWN}") for node in nodes]
        graph = f"{component}: the {precision} graph's {matching}"
        if cosines is None or not _has_decisions(torchs, cosines) or not _has_decisions(own, cosines):
            raise GateError(
                f"{graph} cannot be compared, expected finite cosines [B, N, D] and two decisions [B, N] for inputs of "
                f"shape {dict(shapes)}. {_ADVICE}"
            )
        value = _compute_regret(cosines, *torchs)
        for whose, regret in (("torch's", value), ("its own", _compute_regret(cosines, *own))):
            if not regret <= bound:
                raise GateError(
                    f"{graph} scores another decision higher than {whose} by {regret:.3g}, expected at most {bound:g}, "
                    f"for inputs of shape {dict(shapes)}. {_ADVICE}"
                )
        count = cosines.shape[2]
        if not np.array_equal(own[1][:, -count:], torchs[1][:, -count:]):
            raise GateError(f"{graph} has other destinations than torch for inputs of shape {dict(shapes)}. {_ADVICE}")
        results.append(GateResult(output=matching, shapes=dict(shapes), metric="absolute", value=value, bound=bound))
    return results


def _has_decisions(decisions: list[NDArray[Any] | None], cosines: NDArray[Any]) -> TypeGuard[list[NDArray[Any]]]:
    """Return whether cosines are finite, and the decisions are destinations and an order of their tokens."""
    if cosines.ndim != 3 or not cosines.size or not np.isfinite(cosines).all():
        return False
    destination, order = decisions
    if destination is None or order is None or {destination.shape, order.shape} != {cosines.shape[:2]}:
        return False
    in_range = destination.min() >= 0 and destination.max() < cosines.shape[2]
    return bool(in_range and (np.sort(order, axis=1) == np.arange(cosines.shape[1])).all())


def _compute_regret(cosines: NDArray[np.float32], destination: NDArray[np.int64], order: NDArray[np.int64]) -> float:
    """Return the difference between the best decision's cosine and that of the given decision.

    Args:
        cosines: float32 [B, N, D], of N tokens with D destinations.
        destination: int64 [B, N], the destination of each token.
        order: int64 [B, N], the tokens in the order of merging, the destinations last.
    """
    best = cosines.max(axis=2)
    worse = best - np.take_along_axis(cosines, destination[..., None], axis=2)[..., 0]
    sources = np.take_along_axis(best, order[:, : order.shape[1] - cosines.shape[2]], axis=1)
    # Cosines never rise in the right order; a rise above an earlier one means that a more similar token was skipped.
    risen = sources - np.minimum.accumulate(sources, axis=1)
    return float(max(worse.max(initial=0.0), risen.max(initial=0.0)))


def _force(model: ir.Model, node: ir.Node) -> str | None:
    """Replace a matching's decision by an input and return its name; return None for other nodes."""
    matching = str(node.name).rpartition("/")[0]
    if node.op_type not in _DECISIONS or matching.rpartition(".")[2] != MATCHING:
        return None
    name, value = f"{matching}/{node.op_type}", node.outputs[-1]
    value.name = f"{name}{_OWN}"
    forced = ir.Value(name=name, type=value.type, shape=value.shape)
    ir.convenience.replace_all_uses_with(value, forced)
    model.graph.inputs.append(forced)
    model.graph.outputs.append(value)
    if node.op_type == _DECISIONS[0] and node.inputs[0] is not None:
        node.inputs[0].name = f"{matching}/MatMul"
        model.graph.outputs.append(node.inputs[0])
    return name

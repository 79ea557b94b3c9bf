"""Metrics of a gate: the difference between two outputs that should be the same.

Every conversion, from torch to a graph to an engine, is compared by these metrics; the manifest records the values and
their bounds (`latentrt.bundle.manifest.GateResult`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import GateMetric

__all__ = ["NOT_COMPARED", "difference", "find_mismatch", "message"]

# Outputs without a metric, of which only shape and dtype are compared: a verdict may flip at its threshold for any
# difference of the score.
NOT_COMPARED = frozenset({"flagged"})


def difference(reference: NDArray[Any], found: NDArray[Any] | None, metric: GateMetric) -> float:
    """Return the difference by a metric of `GateResult`.

    Returns:
        NaN where the two cannot be compared, which is a miss of every bound: `found` is missing, shapes or dtypes
        differ, there are no values, or a value is not finite.
    """
    if found is None or find_mismatch(reference, found, "the reference's") is not None:
        return float("nan")
    if metric == "rms":
        return _rms(found.astype(np.float64) - reference) / max(_rms(reference), float(np.finfo(np.float32).tiny))
    largest = float(np.abs(found.astype(np.float64) - reference.astype(np.float64)).max())
    if metric != "relative":
        return largest
    return largest / max(float(np.abs(reference).max()), float(np.finfo(np.float32).tiny))


def _rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def find_mismatch(reference: NDArray[Any], found: NDArray[Any] | None, owner: str) -> str | None:
    """Return the reason why an output cannot be compared with its reference, as the predicate of a sentence.

    Args:
        found: the output; None if the graph has none of this name.
        owner: of the reference, in the possessive, such as `torch's`.

    Returns:
        None if the two have the same shape and dtype and at least one value, all finite.
    """
    if found is None:
        return f"is missing, {owner} is not,"
    if reference.shape != found.shape:
        return f"has the shape {found.shape}, {owner} {reference.shape},"
    if reference.dtype != found.dtype:
        return f"has the dtype {found.dtype}, {owner} {reference.dtype},"
    if not reference.size:
        return f"has no values, like {owner},"
    if not np.isfinite(reference).all():
        return f"cannot be compared, {owner} has values that are not finite,"
    if not np.isfinite(found).all():
        return "has values that are not finite"
    return None


def message(reference: NDArray[Any], found: NDArray[Any] | None, value: float, metric: GateMetric, owner: str) -> str:
    """Return the fault of an output as the predicate of a sentence.

    Args:
        value: the difference by `metric`.
        owner: of the reference, in the possessive, such as `torch's`.
    """
    return find_mismatch(reference, found, owner) or f"is {value:.3g} ({metric}) from {owner}"

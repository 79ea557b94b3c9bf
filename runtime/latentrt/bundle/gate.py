"""Metrics of a gate: the difference between two outputs that should be the same.

Every conversion, from torch to a graph to an engine, is compared by these metrics; the manifest records the values and
their bounds (`latentrt.bundle.manifest.GateResult`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import GateMetric

__all__ = ["NOT_COMPARED", "difference", "message"]

# Outputs without a metric: a verdict may flip at its threshold for any difference of the score.
NOT_COMPARED = frozenset({"flagged"})


def difference(reference: NDArray[Any], found: NDArray[Any], metric: GateMetric) -> float:
    """Return the difference by a metric of `GateResult`; NaN where shapes differ or a value is not finite."""
    if reference.shape != found.shape or not (np.isfinite(found).all() and np.isfinite(reference).all()):
        return float("nan")
    if metric == "rms":
        return _rms(found.astype(np.float64) - reference) / max(_rms(reference), float(np.finfo(np.float32).tiny))
    largest = float(np.abs(found.astype(np.float64) - reference.astype(np.float64)).max(initial=0.0))
    if metric != "relative":
        return largest
    return largest / max(float(np.abs(reference).max(initial=0.0)), float(np.finfo(np.float32).tiny))


def _rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0


def message(reference: NDArray[Any], found: NDArray[Any], value: float, metric: GateMetric, owner: str) -> str:
    """Return the fault of an output as the predicate of a sentence.

    Args:
        value: the difference by `metric`.
        owner: of the reference, in the possessive, such as `torch's`.
    """
    if reference.shape != found.shape:
        return f"has the shape {found.shape}, {owner} {reference.shape},"
    if not np.isfinite(reference).all():
        return f"cannot be compared, {owner} has values that are not finite,"
    if not np.isfinite(found).all():
        return "has values that are not finite"
    return f"is {value:.3g} ({metric}) from {owner}"

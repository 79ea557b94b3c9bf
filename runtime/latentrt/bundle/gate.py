"""How far is one output from another?

The measures of a gate: whatever two hops compute the same thing, from torch to a graph to an engine, are compared
by them, and the manifest states their figures and bounds.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["NOT_COMPARED", "Measure", "difference", "words"]

Measure = Literal["relative", "absolute", "levels", "rms"]

# A verdict flips at its threshold however close the score is.
NOT_COMPARED = frozenset({"flagged"})


def difference(reference: NDArray[Any], found: NDArray[Any], measure: Measure) -> float:
    """The difference, as `GateFigure` has it; NaN where shapes differ or a value is not finite."""
    if reference.shape != found.shape or not (np.isfinite(found).all() and np.isfinite(reference).all()):
        return float("nan")
    if measure == "rms":
        return _rms(found.astype(np.float64) - reference) / max(_rms(reference), float(np.finfo(np.float32).tiny))
    largest = float(np.abs(found.astype(np.float64) - reference.astype(np.float64)).max(initial=0.0))
    if measure != "relative":
        return largest
    return largest / max(float(np.abs(reference).max(initial=0.0)), float(np.finfo(np.float32).tiny))


def _rms(values: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0


def words(reference: NDArray[Any], found: NDArray[Any], figure: float, measure: Measure, whose: str) -> str:
    """What is wrong with an output, as the end of a sentence.

    Args:
        whose: the reference is, as in `torch's`.
    """
    if reference.shape != found.shape:
        return f"has the shape {found.shape}, {whose} {reference.shape},"
    if not np.isfinite(reference).all():
        return f"cannot be judged, {whose} has values that are not finite,"
    if not np.isfinite(found).all():
        return "has values that are not finite"
    return f"is {figure:.3g} ({measure}) from {whose}"

"""Is a graph the module it was made of? Every graph is run beside torch, on sizes that were not traced, before it may be shipped.

The bounds, one place for all. Measured on random and full-size Stable Diffusion 1.5 weights (`benchmarks/results`), each bound
is several times the largest figure seen, and several times smaller than what a real defect (a swapped weight, a wrong epsilon in a
norm, a mis-sized skip connection) costs:

* float32 graphs differ from torch by the order of float32 sums: 1e-6 relative seen, 1e-4 allowed.
* float32 graphs over half weights add the rounding of the weights, 2⁻¹¹ each, which averages out over a layer; half graphs add
  the rounding of every intermediate value. torch with the same half-rounded weights is the reference for the former, so that its
  bound is the float32 one; for the latter the bound is what rounding at every node may cost.
* pixels are integers: one level where a value sits on the edge between two; half rounds more of them to the neighbour.
* the safety graph's cosines are compared absolutely, on their scale of −1 … 1; scores are rounded to three places, as the torch
  checker does, so that one step of rounding, 0.001, comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import GateError
from latentrt.manifest import GateFigure, Precision

__all__ = ["Measure", "bound_of", "compare", "measure_of"]

Measure = Literal["relative", "absolute", "levels"]

_MEASURES: dict[str, Measure] = {
    "pixels": "levels",
    "concept_cosines": "absolute",
    "special_care_cosines": "absolute",
    "concept_scores": "absolute",
    "special_care_scores": "absolute",
}
_BOUNDS: dict[Measure, dict[Precision, float]] = {
    "relative": {"float32": 1e-4, "float16": 3e-2},
    "absolute": {"float32": 2e-3, "float16": 2e-2},
    "levels": {"float32": 1, "float16": 8},
}


def measure_of(output: str) -> Measure | None:
    """How an output is compared; None for one that is not: a verdict flips at its threshold however close the score is."""
    return None if output == "flagged" else _MEASURES.get(output, "relative")


def bound_of(measure: Measure, precision: Precision) -> float:
    """The largest figure that passes the gate."""
    return _BOUNDS[measure][precision]


def compare(
    component: str,
    precision: Precision,
    feeds: Mapping[str, NDArray[Any]],
    expected: Mapping[str, NDArray[Any]],
    found: Mapping[str, NDArray[Any]],
) -> list[GateFigure]:
    """Compare a graph's outputs with the module's.

    Args:
        component, precision: of the graph, to choose the bounds and to name it.
        feeds: the inputs both were run on.
        expected: what torch gives. found: what the graph gives.

    Returns:
        A figure for each output that is compared.

    Raises:
        GateError: a figure is above its bound, or is not a number.
    """
    shapes = {name: array.shape for name, array in feeds.items()}
    figures = []
    for output, reference in expected.items():
        measure = measure_of(output)
        if measure is None:
            continue
        figure, bound = _difference(reference, found[output], measure), bound_of(measure, precision)
        figures.append(GateFigure(output=output, shapes=shapes, measure=measure, figure=figure, bound=bound))
        if not figure <= bound:
            raise GateError(
                f"{component}: the {precision} graph's {output} is {figure:.3g} ({measure}) from torch's for inputs of shape {shapes}; "
                f"the bound is {bound:g}. No bundle was written"
            )
    return figures


def _difference(reference: NDArray[Any], found: NDArray[Any], measure: Measure) -> float:
    if reference.shape != found.shape or not np.isfinite(found).all():
        return float("nan")
    difference = float(np.abs(found.astype(np.float64) - reference.astype(np.float64)).max(initial=0.0))
    if measure != "relative":
        return difference
    return difference / max(float(np.abs(reference).max(initial=0.0)), np.finfo(np.float32).tiny)

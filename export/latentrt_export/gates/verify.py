"""Compares a graph's outputs with those of its torch module, and holds the bounds of every comparison.

Every graph is compared with torch at sizes that were not traced, before it is written to a bundle.

The bounds, by output and by the precision in which a graph computes. Each, except that of pixels, is several times the
largest difference measured on tiny random checkpoints and on a full-size Stable Diffusion 1.5 of random weights
(`docs/measurements.md`), because trained weights have larger differences. `tests/export/gates/test_verify.py` shows the
differences that defects cause (a swapped weight, a wrong epsilon in a norm).

* float32 differs from torch by the order of sums: 1.3e-5 of the largest value in the encoder, 3e-6 elsewhere. A float32
  graph over half weights is compared with torch on the same rounded weights, so its bound is the same.
* float16 adds the rounding of every weight and value, 2⁻¹¹ each: 2.4e-3 measured, compared with torch on the
  checkpoint's own weights.
* pixels are integers. A value on the edge between two levels may be one level off, but at most one value in a hundred
  (1.6 in ten thousand measured, full size), because a different rounding mode would be one level off everywhere.
  float16 was 2 levels off; 4 are allowed.
* cosines are compared on their scale of −1 … 1: 4e-6 measured, 1.3e-4 in float16. Scores are cosines minus a threshold,
  rounded to three decimals as the torch checker does, so one step of 0.001 is added; in float16 also the 0.01 by which
  a special-care score on its edge raises the others.
* a verdict is not compared: it flips at its threshold for arbitrarily small differences.
* int8 is compared with torch on the checkpoint's own weights, by the RMS of the difference over the RMS of the output,
  because rounding adds noise to every value, which a maximum describes badly. The bound is lower where only weights are
  int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.gate import NOT_COMPARED, difference, find_mismatch, message
from latentrt.bundle.manifest import GateMetric, GateResult, Precision, QuantizationMethod
from latentrt.errors import GateError
from latentrt_export.modules.module import Arrays

__all__ = ["Run", "check_output", "compare", "get_tolerance", "rms_bound"]

# The largest share of pixel values that may lie on the edge between two levels.
_EDGE_SHARE = 0.01
# The bound of every output of an int8 graph.
_RMS: dict[QuantizationMethod, float] = {"static": 0.05, "weights": 0.02}
# The default: hidden states, noise, a latent distribution.
_RELATIVE: tuple[GateMetric, dict[Precision, float]] = ("relative", {"float32": 1e-4, "float16": 1e-2})
_TOLERANCES: dict[str, tuple[GateMetric, dict[Precision, float]]] = {
    "pixels": ("levels", {"float32": 1, "float16": 4}),
    "concept_cosines": ("absolute", {"float32": 1e-4, "float16": 5e-3}),
    "special_care_cosines": ("absolute", {"float32": 1e-4, "float16": 5e-3}),
    "concept_scores": ("absolute", {"float32": 1.1e-3, "float16": 1.6e-2}),
    "special_care_scores": ("absolute", {"float32": 1.1e-3, "float16": 1.6e-2}),
}


@dataclass(frozen=True)
class Run:
    """One evaluation: the inputs, the outputs of torch or of the whole graph, and the token matchings.

    Attributes:
        feeds: inputs by name.
        outputs: reference outputs by name.
        forced: the decisions of token matchings, which become inputs of a graph (`gates.token_merging`).
    """

    feeds: Arrays
    outputs: Arrays
    forced: Arrays = field(default_factory=dict)


def rms_bound(method: QuantizationMethod) -> float:
    """Return the largest relative RMS error that an int8 graph may have."""
    return _RMS[method]


def get_tolerance(
    output: str, precision: Precision, quantized: QuantizationMethod | None = None
) -> tuple[GateMetric, float]:
    """Return the metric and the bound of an output; `quantized` is the method of an int8 graph."""
    if quantized is not None:
        return "rms", rms_bound(quantized)
    metric, bounds = _TOLERANCES.get(output, _RELATIVE)
    return metric, bounds[precision]


def compare(
    component: str,
    precision: Precision,
    feeds: Mapping[str, NDArray[Any]],
    expected: Mapping[str, NDArray[Any]],
    found: Mapping[str, NDArray[Any]],
    quantized: QuantizationMethod | None = None,
) -> list[GateResult]:
    """Compare the outputs of a graph with those of its torch module.

    Args:
        component, precision: the graph's; the precision selects the bounds, and errors name both.
        feeds: the inputs of both.
        expected, found: the outputs of torch and of the graph.
        quantized: the method of an int8 graph.

    Returns:
        A result for each output that is compared.

    Raises:
        GateError: a difference exceeds its bound, an output cannot be compared, or there is none to compare.
    """
    graph, advice = f"{component}: the {precision} graph", _advise(precision, quantized)
    results = []
    for output, reference in expected.items():
        metric, bound = get_tolerance(output, precision, quantized)
        if output in NOT_COMPARED:
            mismatch = find_mismatch(reference, found.get(output), "torch's")
            if mismatch is not None:
                raise GateError(f"{graph}: {output} {mismatch} expected the same. No bundle was written")
            continue
        results.append(
            check_output(
                graph,
                output,
                reference,
                found.get(output),
                metric,
                bound,
                feeds=feeds,
                reference_name="torch's",
                advice=advice,
            )
        )
    if not results:
        raise GateError(
            f"{graph}: it has no output that can be compared with torch's, expected one. No bundle was written"
        )
    return results


def check_output(
    graph: str,
    output: str,
    reference: NDArray[Any],
    found: NDArray[Any] | None,
    metric: GateMetric,
    bound: float,
    *,
    feeds: Mapping[str, NDArray[Any]],
    reference_name: str,
    advice: str,
) -> GateResult:
    """Compare one output with its reference.

    Args:
        graph, reference_name: descriptions of the graph and of the reference's origin (`torch's`), for errors.
        found: the graph's; None if the graph has no such output.
        feeds: the inputs of both; the result records their shapes.
        advice: the option that avoids this graph, for errors; may be empty.

    Raises:
        GateError: the difference exceeds `bound`; the two cannot be compared, for a value that is not finite, no value
            at all, another shape or another dtype; or more than one pixel value in a hundred differs, where the bound
            is one level.
    """
    shapes = {name: array.shape for name, array in feeds.items()}
    value = difference(reference, found, metric)
    problem = None
    if not value <= bound:
        problem = message(reference, found, value, metric, reference_name)
    elif metric == "levels" and bound <= 1 and (share := float(np.mean(reference != found))) > _EDGE_SHARE:
        problem = f"differs in {share:.1%} of its values, expected at most {_EDGE_SHARE:.0%}"
    if problem is not None:
        remedy = f"; {advice}" if advice else ""
        raise GateError(
            f"{graph}: {output} {problem} for inputs of shape {shapes}; the bound is {bound:g}. "
            f"No bundle was written{remedy}"
        )
    return GateResult(output=output, shapes=shapes, metric=metric, value=value, bound=bound)


def _advise(precision: Precision, quantized: QuantizationMethod | None) -> str:
    if quantized is None:
        return "`precision='float32'` may pass" if precision == "float16" else ""
    alternative = "`method='weights'` or " if quantized == "static" else ""
    return f"this model loses too much in int8: {alternative}`precision='float16'` may pass"

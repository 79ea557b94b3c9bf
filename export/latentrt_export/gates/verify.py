"""Is a graph the module it was made of?

Every graph is run beside torch, on sizes that were not traced, before it may be shipped.

The bounds, one place for all: output → measure, bound of a graph that computes in float32, bound of one that computes
in half. Each but the pixels' is several times the largest figure seen, on tiny random checkpoints and on a full-size
Stable Diffusion 1.5 of random weights (`docs/measurements.md`), as a trained model reaches further. What defects cost
(a swapped weight, a wrong epsilon in a norm) is in `tests/export/gates/test_verify.py`.

* float32 differs from torch by the order of sums: 1.3e-5 of the largest value seen in the encoder, 3e-6 elsewhere. Over
  half weights it is judged beside torch with the same rounded weights, so the bound is the same.
* half adds the rounding of every weight and value, 2⁻¹¹ each: 2.4e-3 seen, beside torch with the checkpoint's own
  weights.
* pixels are integers: one level where a value sits on the edge between two, which is seen and allowed, of one value in
  a hundred at most (1.6 in ten thousand were seen, full size), as another rounding would be one level off everywhere.
  Half was 2 levels off, 4 are allowed.
* cosines are compared on their scale of −1 … 1: 4e-6 seen, 1.3e-4 in half. Scores are cosines less a threshold, rounded
  to three places as the torch checker does, so one step of that, 0.001, comes on top; and where a special-care score is
  on its edge, the 0.01 that it adds to the others in half.
* a verdict is not compared: it flips at its threshold however close the score is.
* int8 is judged beside torch with the checkpoint's own weights, by the RMS of the difference over that of the output:
  rounding is noise on every value, and its largest value says little. Where weights alone are int8 there is less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.gate import NOT_COMPARED, difference, message
from latentrt.bundle.manifest import GateMetric, GateResult, Precision, QuantizationMethod
from latentrt.errors import GateError

__all__ = ["compare", "gate_of", "rms_bound", "too_many_off"]

# Of pixels, that lie on the edge between two levels.
_ON_EDGE = 0.01
# Of whatever an int8 graph makes.
_RMS: dict[QuantizationMethod, float] = {"static": 0.05, "weights": 0.02}
# Where nothing else is said: hidden states, noise, a latent distribution.
_RELATIVE: tuple[GateMetric, dict[Precision, float]] = ("relative", {"float32": 1e-4, "float16": 1e-2})
_GATES: dict[str, tuple[GateMetric, dict[Precision, float]]] = {
    "pixels": ("levels", {"float32": 1, "float16": 4}),
    "concept_cosines": ("absolute", {"float32": 1e-4, "float16": 5e-3}),
    "special_care_cosines": ("absolute", {"float32": 1e-4, "float16": 5e-3}),
    "concept_scores": ("absolute", {"float32": 1.1e-3, "float16": 1.6e-2}),
    "special_care_scores": ("absolute", {"float32": 1.1e-3, "float16": 1.6e-2}),
}


def rms_bound(method: QuantizationMethod) -> float:
    """The largest figure that an output of an int8 graph passes with."""
    return _RMS[method]


def gate_of(output: str, precision: Precision, quantized: QuantizationMethod | None = None) -> tuple[GateMetric, float]:
    """How an output is compared, and the largest figure that passes; `quantized` is how an int8 graph was."""
    if quantized is not None:
        return "rms", rms_bound(quantized)
    measure, bounds = _GATES.get(output, _RELATIVE)
    return measure, bounds[precision]


def too_many_off(reference: NDArray[Any], found: NDArray[Any], measure: GateMetric, bound: float) -> str | None:
    """What is wrong with pixels of which each is within one level, as the end of a sentence: too many are not the
    same."""
    if measure != "levels" or bound > 1:
        return None
    share = float(np.mean(reference != found))
    return f"differs in {share:.1%} of its values, expected at most {_ON_EDGE:.0%}" if share > _ON_EDGE else None


def compare(
    component: str,
    precision: Precision,
    feeds: Mapping[str, NDArray[Any]],
    expected: Mapping[str, NDArray[Any]],
    found: Mapping[str, NDArray[Any]],
    quantized: QuantizationMethod | None = None,
) -> list[GateResult]:
    """Compare a graph's outputs with the module's.

    Args:
        component, precision: of the graph, to choose the bounds and to name it.
        feeds: the inputs both were run on.
        expected: what torch gives. found: what the graph gives.
        quantized: how an int8 graph was.

    Returns:
        A figure for each output that is compared.

    Raises:
        GateError: a figure is above its bound, or is not a number.
    """
    shapes = {name: array.shape for name, array in feeds.items()}
    figures = []
    for output, reference in expected.items():
        if output in NOT_COMPARED:
            continue
        measure, bound = gate_of(output, precision, quantized)
        figure = difference(reference, found[output], measure)
        if not figure <= bound:
            wrong = message(reference, found[output], figure, measure, "torch's")
            raise GateError(
                f"{component}: the {precision} graph's {output} {wrong} for inputs "
                f"of shape {shapes}; the bound is {bound:g}. No bundle was written{_advice(precision, quantized)}"
            )
        if off := too_many_off(reference, found[output], measure, bound):
            raise GateError(
                f"{component}: the {precision} graph's {output} {off}, for inputs of shape {shapes}. No bundle was "
                "written"
            )
        figures.append(GateResult(output=output, shapes=shapes, metric=measure, value=figure, bound=bound))
    return figures


def _advice(precision: Precision, quantized: QuantizationMethod | None) -> str:
    if quantized is None:
        return "; --precision float32 may do" if precision == "float16" else ""
    milder = "--quantization weights or " if quantized == "static" else ""
    return f". This model does not bear it; {milder}--precision float16 may do"

"""Guidance strategies, compared with their formulas."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.sampling.guidance import ClassifierFree, Guidance, ImageAndText, Unguided


def outputs(count: int, seed: int = 0) -> list[NDArray[np.float32]]:
    """Outputs of a denoiser, [4, 9, 7] each."""
    return [*np.random.default_rng(seed).standard_normal((count, 4, 9, 7), dtype=np.float32)]


def test_without_guidance_the_positive_evaluation_is_the_output() -> None:
    (positive,) = outputs(1)
    assert Unguided().evaluations(3, 10) == Unguided().all_evaluations() == ("positive",)
    assert Unguided().combine([positive]) is positive


@pytest.mark.parametrize("scale", [1.5, 7.5, 30.0])
def test_classifier_free_guidance_extrapolates_from_the_negative_output(scale: float) -> None:
    negative, positive = outputs(2)
    found = ClassifierFree(scale=scale).combine([negative, positive])
    exact = negative.astype(np.float64) + scale * (positive.astype(np.float64) - negative)
    assert found.dtype == np.float32
    # Three roundings of numbers up to scale · 8.
    np.testing.assert_allclose(found, exact, rtol=0, atol=3 * 2**-24 * scale * 8)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescaling_returns_the_deviation_towards_the_positive_output(rescale: float) -> None:
    """Lin et al. 2023, equations 15 and 16, in float64."""
    negative, positive = outputs(2)
    found = ClassifierFree(scale=7.5, rescale=rescale).combine([negative, positive])
    guided = ClassifierFree(scale=7.5).combine([negative, positive]).astype(np.float64)
    expected = rescale * guided * positive.std(ddof=1, dtype=np.float64) / guided.std(ddof=1) + (1 - rescale) * guided
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    if rescale == 1:
        assert found.std(dtype=np.float64) == pytest.approx(positive.std(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize(
    ("start", "end", "guided"),
    [(0.0, 1.0, "1111"), (0.25, 1.0, "0111"), (0.3, 1.0, "0011"), (0.0, 0.5, "1100"), (0.5, 0.5, "0000")],
)
def test_rows_are_guided_in_diffusers_interval(start: float, end: float, guided: str) -> None:
    """diffusers, `pipeline_controlnet.py`: 1 − float(i / n < start or (i + 1) / n > end)."""
    strategy = ClassifierFree(scale=5.0, start=start, end=end)
    found = [strategy.evaluations(row, 4) for row in range(4)]
    assert found == [("negative", "positive") if each == "1" else ("positive",) for each in guided]
    assert guided == "".join(str(int(1 - float(i / 4 < start or (i + 1) / 4 > end))) for i in range(4))
    assert strategy.all_evaluations() == ("negative", "positive")


def test_outside_of_the_interval_the_positive_output_is_taken_alone() -> None:
    (positive,) = outputs(1)
    assert ClassifierFree(scale=5.0, rescale=0.7, end=0.5).combine([positive]) is positive


def test_image_and_text_have_scales_of_their_own() -> None:
    """Brooks et al. 2023, equation 3: unconditional + s_I (image − unconditional) + s_T (both − image)."""
    positive, image, unconditional = outputs(3)
    strategy = ImageAndText(scale=7.5, image_scale=1.5)
    assert strategy.evaluations(0, 9) == strategy.all_evaluations() == ("positive", "image", "unconditional")
    exact = [each.astype(np.float64) for each in (positive, image, unconditional)]
    expected = exact[2] + 1.5 * (exact[1] - exact[2]) + 7.5 * (exact[0] - exact[1])
    found = strategy.combine([positive, image, unconditional])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "scale"),
    [
        (Unguided(), 1.0),
        (ClassifierFree(scale=5.0), 5.0),
        (ClassifierFree(scale=5.0, end=0.5), 5.0),
        (ClassifierFree(scale=5.0, rescale=0.5), None),
        (ImageAndText(scale=5.0, image_scale=1.5), None),
    ],
    ids=str,
)
def test_a_device_applies_guidance_that_one_scale_describes(strategy: Guidance, scale: float | None) -> None:
    assert strategy.device_scale() == scale

"""Feeds are checked before a graph runs."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest

from latentrt.bundle.tensors import TensorSpec, check_feeds
from latentrt.errors import FeedError

SPECS = (TensorSpec("sample", "float32", ("batch", 4, "height")), TensorSpec("timestep", "float32", ("batch",)))


def feeds(**changed: Any) -> dict[str, Any]:
    return {"sample": np.zeros((2, 4, 8), np.float32), "timestep": np.zeros(2, np.float32), **changed}


def test_valid_feeds_are_accepted() -> None:
    check_feeds(SPECS, feeds())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sample": np.zeros((2, 4, 8))}, "input sample: got float64, expected float32"),
        (
            {"sample": np.zeros((2, 4), np.float32)},
            r"got shape \(2, 4\), expected 3 axes as in sample float32\[batch, 4, height\]",
        ),
        ({"sample": np.zeros((2, 5, 8), np.float32)}, "axis 4 of .* is 4"),
        ({"timestep": np.zeros(3, np.float32)}, r"input timestep: got shape \(3,\), but axis batch .* is 2"),
        ({"sample": np.zeros((2, 4, 0), np.float32)}, "axis height"),
        ({"extra": np.zeros(1, np.float32)}, r"got inputs \['extra', 'sample', 'timestep'\]"),
    ],
)
def test_invalid_feeds_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(FeedError, match=says):
        check_feeds(SPECS, feeds(**given))


@pytest.mark.parametrize(("latents", "pixels", "fits"), [(3, 24, True), (3, 25, False), (4, 24, False)])
def test_multiples_of_an_axis(latents: int, pixels: int, fits: bool) -> None:
    """In either order of the inputs: a backend takes the sizes of its outputs from them."""
    specs = (TensorSpec("latents", "float32", ("b", "height")), TensorSpec("pixels", "float32", ("b", "8*height")))
    arrays = {"latents": np.zeros((1, latents), np.float32), "pixels": np.zeros((1, pixels), np.float32)}
    for ordered in (specs, specs[::-1]):
        with contextlib.nullcontext() if fits else pytest.raises(FeedError, match=r"axis .*height"):
            check_feeds(ordered, arrays)


def test_a_missing_input_is_refused() -> None:
    with pytest.raises(FeedError, match=r"got inputs \['sample'\], expected \['sample', 'timestep'\]"):
        check_feeds(SPECS, {"sample": np.zeros((2, 4, 8), np.float32)})

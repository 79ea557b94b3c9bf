"""Bound values: run on the CPU, where binding works as on a GPU but for CUDA's graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from latentrt.backends.bound_session import BoundSession
from latentrt.backends.onnxruntime import OnnxRuntimeSession, open_session
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec, axis_sizes, sized
from latentrt.errors import BackendError


@pytest.fixture
def plain() -> OnnxRuntimeSession:
    return open_session(Bundle.open(bundle_path()), "vae_encoder", threads=1)


@pytest.fixture
def bound(plain: OnnxRuntimeSession) -> BoundSession:
    return bind(plain, "vae_encoder")


def bind(plain: OnnxRuntimeSession, name: str) -> BoundSession:
    component = Bundle.open(bundle_path()).manifest.components[name]
    return BoundSession(
        onnxruntime, plain._session, plain._graph, component.inputs, component.outputs, [], device="cpu", graphs=False
    )


def pixels(side: int, seed: int) -> dict[str, NDArray[Any]]:
    return {"pixels": np.random.default_rng(seed).random((1, 3, side, 64), np.float32)}


def test_a_bound_graph_computes_the_same(plain: OnnxRuntimeSession, bound: BoundSession) -> None:
    """Of more sets of shapes than are kept, and again of the first."""
    for seed, side in enumerate((32, 32, 48, 64, 80, 96, 112, 32)):
        feeds = pixels(side, seed)
        expected, found = plain.run(feeds), bound.run(feeds)
        assert expected.keys() == found.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)


def test_results_are_the_callers_own(bound: BoundSession) -> None:
    first = bound.run(pixels(32, 1))["mean"]
    kept = first.copy()
    bound.run(pixels(32, 2))
    np.testing.assert_array_equal(first, kept)


def test_an_array_that_was_written_to_is_copied_again(plain: OnnxRuntimeSession, bound: BoundSession) -> None:
    feeds = pixels(32, 1)
    bound.run(feeds)
    feeds["pixels"][...] = 0.5
    np.testing.assert_array_equal(bound.run(feeds)["mean"], plain.run(feeds)["mean"])


def test_a_backends_exception_becomes_a_backend_error() -> None:
    encoder = open_session(Bundle.open(bundle_path()), "text_encoder", threads=1)
    ids = np.full((1, 77), 10**9, np.int64)  # a token that the vocabulary does not have
    with pytest.raises(BackendError, match="ONNX Runtime failed"):
        bind(encoder, "text_encoder").run({"input_ids": ids, "clip_skip": np.zeros(1, np.int64)})


def test_sizes_follow_from_inputs_and_give_the_shapes_of_outputs() -> None:
    taken = (TensorSpec("pixels", "float32", ("batch", 3, "8*height", "8*width")),)
    sizes = axis_sizes(taken, {"pixels": (2, 3, 64, 80)})
    assert sizes == {"batch": 2, "height": 8, "width": 10}
    assert sized(TensorSpec("mean", "float32", ("batch", 4, "height", "width")), sizes) == (2, 4, 8, 10)
    assert sized(TensorSpec("all", "uint8", ("batch", "4*height", "width", 3)), sizes) == (2, 32, 10, 3)

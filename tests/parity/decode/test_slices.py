"""Slices of decoders that were exported from tiny checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

from latentrt import Bundle
from latentrt.backends import onnxruntime as ort
from latentrt.backends.session import run
from tests.exported import Exported
from tests.runtime.decode.test_slices import DECODER, open_sliced


@pytest.mark.parametrize("model", ["sd1", "sd2"])
def test_slices_give_the_whole_decoders_pixels(model: str, request: pytest.FixtureRequest) -> None:
    """In float32, and with half weights and another autoencoder."""
    exported: Exported = request.getfixturevalue(model)
    bundle = Bundle.open(exported.bundle)
    decoder, events = open_sliced(bundle, ort)
    latents = np.random.default_rng(0).standard_normal((2, 4, 19, 9), dtype=np.float32)
    found = run(decoder, latents=latents)["pixels"]
    expected = run(ort.open_session(bundle, DECODER, threads=1), latents=latents)["pixels"]
    # A level where a value lies on the edge between two, as sums are in another order.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert sorted(event[1:] for event in events if event[0] == "+") == sorted(bundle.manifest.components[DECODER].parts)

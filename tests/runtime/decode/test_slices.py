"""A decoder in slices: the pixels of the whole one on both of a CPU's backends, in less memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import Bundle, Pipeline
from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.session import Session, run
from latentrt.bundle.manifest import PartName
from latentrt.decode.slices import SlicedDecoder, is_sliced
from tests.exported import Exported

DECODER = "vae_decoder"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino")


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def bundle(request: pytest.FixtureRequest) -> Bundle:
    """In float32; and with half weights."""
    exported: Exported = request.getfixturevalue(request.param)
    return Bundle.open(exported.bundle)


def sliced(bundle: Bundle, backend: Any) -> tuple[SlicedDecoder, list[PartName]]:
    """A bundle's decoder in slices, and the parts that it opens, in their order."""
    record, opened = bundle.manifest.components[DECODER], list[PartName]()

    def open_part(name: PartName) -> Session:
        opened.append(name)
        session: Session = backend.open_session(bundle, DECODER, part=name, threads=1)
        return session

    return SlicedDecoder(record.inputs, record.parts, open_part), opened


@pytest.mark.parametrize("backend", [ort, ov], ids=["onnxruntime", "openvino"])
def test_slices_give_the_whole_decoders_pixels(bundle: Bundle, backend: Any) -> None:
    decoder, opened = sliced(bundle, backend)
    latents = np.random.default_rng(0).standard_normal((2, 4, 19, 9), np.float32)
    found = run(decoder, latents=latents)["pixels"]
    expected = run(ort.open_session(bundle, DECODER, threads=1), latents=latents)["pixels"]
    assert found.dtype == np.uint8
    # A level where a value lies on the edge between two, as sums are in another order.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    parts = bundle.manifest.components[DECODER].parts
    assert sorted(opened) == sorted(parts), "each part once"
    assert opened[:3] == ["head", "attention", "neck"]
    assert opened[3:] == [f"slice.{number}" for number in range(len(parts) - 3)]


def test_no_more_is_kept_than_what_a_stage_takes_and_gives(sd1: Exported) -> None:
    """All of the last level's features have 8 channels of 512 × 512, of which two are kept and a tenth comes on top."""
    decoder, _ = sliced(Bundle.open(sd1.bundle), ort)
    latents = np.zeros((1, 4, 64, 64), np.float32)
    tracemalloc.start()  # sees what numpy has, not what a backend has
    try:
        decoder.run({"latents": latents})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    features = 4 * 16 * 512 * 512  # as the upsampler leaves them; the next stage makes 8 channels of these 16
    assert peak < 1.5 * features * 1.2


def test_a_pipeline_with_little_memory_draws_the_same(sd2: Exported, tmp_path: Path) -> None:
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "height": 72, "width": 136, "output_type": "np"}
    pictures = []
    for low_memory in (False, True):
        pipeline = Pipeline.load(sd2.bundle, device="cpu", low_memory=low_memory)
        assert pipeline.runs_on[DECODER].startswith("ONNX Runtime on the CPU, in slices") == low_memory
        pictures.append(pipeline(["a red circle", "a star"], **call).images * 255)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1.001  # as above


def test_tiles_may_be_decoded_in_slices(sd2: Exported) -> None:
    """Pictures larger than the bundle's default, which is what both are for."""
    side = 2 * Bundle.open(sd2.bundle).manifest.defaults.height
    call: dict[str, Any] = {"num_inference_steps": 1, "seed": 3, "height": side, "width": side, "output_type": "np"}
    whole, sliced = (
        Pipeline.load(sd2.bundle, device="cpu", low_memory=low)("a star", decoder="tiled", **call).images * 255
        for low in (False, True)
    )
    assert np.abs(whole - sliced).max() <= 1.001  # as above
    assert whole.std() > 1, "a picture"


def test_what_has_no_stages_is_not_sliced() -> None:
    assert is_sliced(["neck", "head", "slice.0"])
    assert not is_sliced(["head"])
    assert not is_sliced(["time_embedding", "cross_attention_kv", "body"])

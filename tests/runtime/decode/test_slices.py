"""A decoder in slices: the pixels of the whole one on both of a CPU's backends, in less memory."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

from latentrt import Bundle, Pipeline
from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.session import Session, run
from latentrt.decode.slices import SlicedDecoder

DECODER = "vae_decoder"


@pytest.fixture(params=["onnxruntime", pytest.param("openvino", marks=pytest.mark.openvino)])
def backend(request: pytest.FixtureRequest) -> Any:
    """The module of one of a CPU's backends."""
    return {"onnxruntime": ort, "openvino": ov}[request.param]


def open_sliced(bundle: Bundle, backend: Any) -> tuple[SlicedDecoder, list[str]]:
    """Return a bundle's decoder in slices, and the parts that it opens (`+head`) and closes (`-head`)."""
    record, events = bundle.manifest.components[DECODER], list[str]()

    def open_part(name: str) -> Session:
        events.append(f"+{name}")
        session: Session = backend.open_session(bundle, DECODER, part=name, threads=1)
        return session

    def close_part(name: str) -> None:
        events.append(f"-{name}")

    return SlicedDecoder(record.inputs, record.outputs, record.parts, open_part, close_part), events


@pytest.mark.filterwarnings("ignore::DeprecationWarning:openvino")
def test_slices_give_the_whole_decoders_pixels(bundle: Bundle, backend: Any) -> None:
    decoder, events = open_sliced(bundle, backend)
    latents = np.random.default_rng(0).standard_normal((2, 4, 19, 9), dtype=np.float32)
    found = run(decoder, latents=latents)["pixels"]
    expected = run(ort.open_session(bundle, DECODER, threads=1), latents=latents)["pixels"]
    assert found.dtype == np.uint8
    assert found.shape == (2, 76, 36, 3)
    # A level where a value lies on the edge between two, as sums are in another order.
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1
    assert found.std() > 10
    parts = ["head", "attention", "neck", *(f"slice.{number}" for number in range(11))]
    assert sorted(parts) == sorted(bundle.manifest.components[DECODER].parts)
    assert events == [f"{event}{name}" for name in parts for event in "+-"], "one part is in memory at a time"


def test_a_part_that_fails_is_closed(bundle: Bundle) -> None:
    record, closed = bundle.manifest.components[DECODER], list[str]()

    def fail(name: str) -> Session:
        raise MemoryError(name)

    decoder = SlicedDecoder(record.inputs, record.outputs, record.parts, fail, closed.append)
    with pytest.raises(MemoryError):
        decoder.run({"latents": np.zeros((1, 4, 8, 8), np.float32)})
    assert closed == ["head"]


def test_no_more_is_kept_than_the_input_and_output_of_a_slice(bundle: Bundle) -> None:
    """The last level has the image's full size: features that enter it, features that leave it, and a tenth more."""
    decoder, _ = open_sliced(bundle, ort)
    latents = np.zeros((1, 4, 128, 128), np.float32)
    parts = bundle.manifest.components[DECODER].parts
    channels = max(int(spec.shape[1]) for spec in parts["slice.6"].inputs if spec.name == "features")
    tracemalloc.start()  # counts numpy's memory, not a backend's
    try:
        decoder.run({"latents": latents})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    features = 4 * channels * 512 * 512  # as the upsampler leaves them
    assert peak < 1.5 * features * 1.2


@pytest.mark.parametrize("decoder", ["full", "tiled"])
def test_a_pipeline_with_little_memory_generates_the_same(decoder: Any) -> None:
    """Tiles may be decoded in slices."""
    call: dict[str, Any] = {"num_inference_steps": 2, "seed": 3, "height": 72, "width": 136, "output_type": "np"}
    images = []
    for low_memory in (False, True):
        pipeline = Pipeline.load(device="cpu", low_memory=low_memory)
        assert pipeline.runs_on[DECODER].sliced == low_memory
        images.append(pipeline(["a red circle", "a star"], decoder=decoder, **call).images * 255)
    assert np.abs(images[0] - images[1]).max() <= 1.001  # as above
    assert images[0].std() > 1

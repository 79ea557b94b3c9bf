"""What was chosen is asked before any work whether it can do what is wanted, and pictures say what it was."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from latentrt import Pipeline, Request
from latentrt.backends import onnxruntime as ort
from latentrt.bundle.bundle import Bundle
from latentrt.errors import RequestError
from latentrt.sample import bundle_path
from latentrt_engines.cache import EngineCache
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.made_up_machine import build


@pytest.mark.parametrize("device", ["tensorrt", "auto"])
def test_a_denoiser_that_runs_whole_refuses_deep_features_before_any_work(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, device: Any
) -> None:
    build(cache, bundle)
    pipeline = Pipeline.load(bundle_path(), device=device)
    with pytest.raises(
        RequestError,
        match=r"deep_cache 2 with a denoiser on TensorRT-RTX engine \w+, which runs it whole; --device",
    ):
        pipeline.resolve(Request(prompt="a red circle", deep_cache=2))
    Pipeline.load(bundle_path(), device="cpu").resolve(Request(prompt="a red circle", deep_cache=2))


def test_a_picture_says_what_its_denoiser_ran_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(**more: Any) -> str | None:
        drawn = Pipeline.load(bundle_path(), **more)("a red circle", seed=7, num_inference_steps=1)
        return drawn.records[0].backend

    assert backend(device="cpu") == "ONNX Runtime on the CPU"
    assert backend(device="openvino") == "OpenVINO on the CPU in float32"
    open_session = functools.partial(ort.open_session, bundle)
    assert Pipeline(bundle, open_session)("a red circle", num_inference_steps=1).records[0].backend is None

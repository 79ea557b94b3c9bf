"""What was chosen is asked before any work whether it can do what is wanted, and pictures say what it was."""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import pytest

from latentrt import Pipeline, Request
from latentrt.backends import onnxruntime as ort
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.errors import EngineError, RequestError
from latentrt_engines.cache import EngineCache
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.made_up_machine import build


def test_steps_without_guidance_are_asked_of_engines_before_the_first_step(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, caplog: pytest.LogCaptureFixture
) -> None:
    build(cache, bundle)  # for guided pictures, as `latentrt build` does
    request = Request.of(prompt="a red circle", seed=7, num_inference_steps=4, guidance_end=0.5)
    mend = "build one: latentrt build --size … --batch … --guidance both"
    with pytest.raises(EngineError, match=r"unet: no engine runs sample of shape 1×4×16×16.*" + mend):
        next(Pipeline.load(bundle_path(), device="tensorrt").steps(request))
    pipeline = Pipeline.load(bundle_path(), device="auto")
    with caplog.at_level(logging.WARNING, "latentrt"):
        next(steps := pipeline.steps(request))
        assert [mend in record.message for record in caplog.records] == [True]
    assert np.isfinite(list(steps)[-1].latents).all()


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
        pipeline.resolve(Request.of(prompt="a red circle", deep_cache=2))
    Pipeline.load(bundle_path(), device="cpu").resolve(Request.of(prompt="a red circle", deep_cache=2))


def test_a_picture_says_what_its_denoiser_ran_on(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(**more: Any) -> str | None:
        drawn = Pipeline.load(bundle_path(), **more)("a red circle", seed=7, num_inference_steps=1)
        return drawn.records[0].backend

    assert backend(device="cpu") == "ONNX Runtime on the CPU"
    assert backend(device="openvino") == "OpenVINO on the CPU in float32"
    open_session = functools.partial(ort.open_session, bundle)
    assert Pipeline(bundle, open_session)("a red circle", num_inference_steps=1).records[0].backend is None

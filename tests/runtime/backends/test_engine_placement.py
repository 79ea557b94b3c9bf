"""Components on engines: a GPU and its libraries are fakes, the graphs are real."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from latentrt import Pipeline, Request
from latentrt.backends import onnxruntime as ort
from latentrt.backends.models import Components, Models
from latentrt.backends.placement import place_components
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.errors import EngineError, IntegrityError, RequestError, SafetyError
from latentrt_engines.cache import EngineCache
from latentrt_engines.seal import seal
from tests.engines import made_up
from tests.runtime.backends import fake_tensorrt
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.made_up_machine import COMPONENTS, build, with_gpu

ONE: dict[str, Any] = {"prompt": "a red circle", "seed": 7, "num_inference_steps": 1}

pytestmark = pytest.mark.extras  # the lock of the engine cache


@pytest.fixture(autouse=True)
def _no_cuda_in_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "available_providers", lambda: ["CPUExecutionProvider"])


def load(bundle: Bundle, device: Any = "auto") -> Pipeline:
    """Return a pipeline that shares no session with other tests'."""
    return Pipeline(bundle, Components(place_components(bundle, device), models=Models()))


def test_engines_for_this_gpu_generate_the_same_image(bundle: Bundle, cache: EngineCache, api: FakeCudaApi) -> None:
    build(cache, bundle)
    pipelines = [load(bundle), Pipeline.load(bundle_path(), device="cpu", threads=1)]
    assert [*pipelines[0].runs_on] == COMPONENTS
    for name, each in pipelines[0].runs_on.items():
        (stored,) = (engine for engine in cache.engines() if engine.record.identity.component == name)
        assert (each.backend, each.device, each.reason) == ("tensorrt_rtx", "gpu", "")
        assert stored.key[:12] in each.title
    assert not pipelines[0].components.on_cpu
    call = ONE | {"num_inference_steps": 4, "height": 48, "width": 64, "output_type": "np"}
    on_engines, on_cpu = (np.asarray(pipeline(**call).images) for pipeline in pipelines)
    # The stand-in computes the float32 graph, whole; a CPU runs the denoiser in parts.
    np.testing.assert_allclose(on_engines, on_cpu, rtol=0, atol=1.001 / 255)


def test_rows_without_guidance_are_padded_to_the_batch_that_engines_have(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, caplog: pytest.LogCaptureFixture
) -> None:
    build(cache, bundle)  # of guided images, whose batch is 2
    request = Request.of(prompt="a red circle", seed=7, num_inference_steps=4, guidance_end=0.5)
    with caplog.at_level(logging.WARNING, "latentrt"):
        latents = list(load(bundle, "tensorrt").steps(request))[-1].latents
    assert caplog.records == []
    expected = list(Pipeline.load(device="cpu", threads=1).steps(request))[-1].latents
    np.testing.assert_allclose(latents, expected, rtol=0, atol=1e-4)


def test_shapes_that_no_engine_covers_run_elsewhere_with_one_warning(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, caplog: pytest.LogCaptureFixture
) -> None:
    build(cache, bundle)
    pipeline = load(bundle)
    with caplog.at_level(logging.WARNING, "latentrt"):
        for _ in range(2):
            assert pipeline(**ONE, height=128, width=64).images
    (message,) = (record.message for record in caplog.records if "unet" in record.message)
    assert all(part in message for part in ("2×4×32×16", "2×4×8×8 … 2×4×16×16 … 2×4×16×16", "latentrt build"))


def test_engines_only_refuses_shapes_that_no_engine_covers(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi
) -> None:
    build(cache, bundle)
    pipeline = load(bundle, "tensorrt")
    pipeline(**ONE)
    with pytest.raises(EngineError, match=r"unet.*2×4×32×16"):
        next(pipeline.steps(Request.of(**ONE, height=128, width=64)))


def test_the_engine_for_the_fewest_shapes_comes_first(bundle: Bundle, cache: EngineCache, api: FakeCudaApi) -> None:
    build(cache, bundle, size="32..64")
    build(cache, bundle, "unet", size="64x64")
    narrow = made_up.record(bundle, made_up.identity(bundle, "unet"))
    title = place_components(bundle)["unet"].title
    assert narrow.key[:12] in title
    assert "1 more" in title


def test_a_sealed_engine_is_used_where_the_cache_is_empty(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(cache, bundle)
    sealed = seal(bundle, list(cache.engines()), cache, tmp_path / "sealed", overwrite=False)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "another"))

    def open_sealed() -> Pipeline:
        return load(Bundle.open(tmp_path / "sealed", sealed.digest), "tensorrt")

    assert open_sealed()(**ONE).images
    # Its plan is checked like every file of a bundle.
    engine = next(iter(sealed.manifest.engines.values()))
    (tmp_path / "sealed" / engine.plan).write_bytes(b"another plan")
    with pytest.raises((IntegrityError, SafetyError), match=engine.plan):
        open_sealed()(**ONE)


def test_without_an_engine_for_this_gpu_the_reason_names_the_difference(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, made_up.H100)
    build(cache, bundle, "unet")
    placements = place_components(bundle)
    assert {each.device for each in placements.values()} == {"cpu"}
    for part in ("8.9", "9.0", "latentrt build", "latentrt[gpu]"):
        assert part in placements["unet"].reason
    assert "no engine is built of vae_decoder" in placements["vae_decoder"].reason
    with pytest.raises(EngineError, match=r"preview_decoder.*NVIDIA H100"):
        place_components(bundle, "tensorrt")


def test_an_engine_that_the_library_does_not_load_is_tried_once(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, caplog: pytest.LogCaptureFixture
) -> None:
    made_up.publish(cache, bundle, made_up.identity(bundle, "vae_decoder"), b"a plan that it does not load")
    pipeline = load(bundle)
    with caplog.at_level(logging.WARNING, "latentrt"):
        for _ in range(2):
            assert pipeline(**ONE).images
    assert len([record for record in caplog.records if "does not load" in record.message]) == 1


def test_threads_load_an_engine_once(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(cache, bundle)
    loaded = list[str]()
    deserialize = fake_tensorrt.FakeRuntime.deserialize_cuda_engine

    def counting(self: fake_tensorrt.FakeRuntime, plan: bytes) -> fake_tensorrt.FakeEngine | None:
        loaded.append(json.loads(plan)["component"])
        return deserialize(self, plan)

    monkeypatch.setattr(fake_tensorrt.FakeRuntime, "deserialize_cuda_engine", counting)
    call = ONE | {"num_inference_steps": 2, "output_type": "np"}
    expected = load(bundle)(**call).images
    loaded.clear()
    pipeline = load(bundle)
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(lambda _: pipeline(**call).images, range(4)))
    assert sorted(loaded) == ["safety_checker", "text_encoder", "unet", "vae_decoder"]
    for each in images:
        np.testing.assert_array_equal(each, expected)


def test_a_damaged_engine_does_not_run_and_another_backend_does(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, caplog: pytest.LogCaptureFixture
) -> None:
    build(cache, bundle)
    damaged = next(engine for engine in cache.engines() if engine.record.identity.component == "vae_decoder")
    damaged.plan_path.write_bytes(damaged.plan_path.read_bytes()[:-1] + b" ")
    pipeline = load(bundle)
    with caplog.at_level(logging.WARNING, "latentrt"):
        assert pipeline(**ONE).images
    assert "was moved to" in caplog.text
    assert cache.get(damaged.key) is None


@pytest.mark.parametrize("device", ["tensorrt", "auto"])
def test_a_denoiser_that_runs_whole_refuses_deep_features_before_any_work(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, device: Any
) -> None:
    build(cache, bundle)
    request = Request.of(prompt="a red circle", deep_cache=2)
    with pytest.raises(RequestError, match=r"`deep_cache`: got 2.*`device`"):
        load(bundle, device).resolve(request)
    load(bundle, "cpu").resolve(request)


def test_engines_are_shared_by_bundles_of_the_same_weights_alone(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi
) -> None:
    """A plan may be stripped of its weights, which then are the bundle's."""
    plain = made_up.identity(bundle, "unet")
    options = msgspec.structs.replace(plain.options, strip_weights=True)
    identity = msgspec.structs.replace(plain, options=options, weights=None)
    made_up.publish(cache, bundle, identity, made_up.PLAN)
    one = place_components(bundle)["unet"]
    assert one.key == place_components(bundle)["unet"].key
    file = bundle.manifest.components["unet"].weights.file
    files = {**bundle.manifest.files, file: msgspec.structs.replace(bundle.manifest.files[file], sha256="0" * 64)}
    bundle.manifest = msgspec.structs.replace(bundle.manifest, files=files)
    other = place_components(bundle)["unet"]
    assert other.title == one.title, "the same plan"
    assert other.key != one.key

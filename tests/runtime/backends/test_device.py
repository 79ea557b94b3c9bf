"""What runs each submodule: a GPU and its libraries are stood in for, the graphs are real."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from latentrt import Pipeline
from latentrt.backends import device
from latentrt.backends import onnxruntime as ort
from latentrt.backends import openvino as ov
from latentrt.backends.cpu_choice import Preferences
from latentrt.backends.device import choose_sessions
from latentrt.bundle.bundle import Bundle
from latentrt.errors import BackendError, EngineError, IntegrityError, RequestError, SafetyError
from latentrt.sample import bundle_path
from latentrt_engines.cache import EngineCache
from latentrt_engines.seal import seal
from tests.engines import made_up
from tests.runtime.backends import fake_tensorrt
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.made_up_machine import COMPONENTS, build, with_gpu


@pytest.mark.parametrize("title", ["ONNX Runtime on the CPU", "OpenVINO on the CPU in float32"])
def test_without_a_gpu_the_cpu_runs_everything_and_says_why(
    title: str, bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "find_gpu", lambda: made_up.NO_GPU)
    monkeypatch.setattr(ov, "is_installed", lambda: title.startswith("OpenVINO"))
    build(cache, bundle)
    choices = choose_sessions(bundle).choices
    assert choices == dict.fromkeys(COMPONENTS, f"{title}: there is no NVIDIA driver")


def test_engines_for_this_gpu_are_taken_and_draw_the_same_picture(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi
) -> None:
    build(cache, bundle)
    with_engines = Pipeline.load(bundle_path(), device="auto")
    assert all(words.startswith("TensorRT-RTX engine ") for words in with_engines.runs_on.values())
    on_cpu = Pipeline.load(bundle_path(), device="cpu", threads=1)
    pictures = [
        pipeline("a red circle", seed=7, num_inference_steps=4, height=48, width=64, output_type="np").images
        for pipeline in (with_engines, on_cpu)
    ]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("int8", [True, False])
def test_what_is_for_cpus_runs_there_beside_a_gpu(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, monkeypatch: pytest.MonkeyPatch, int8: bool
) -> None:
    monkeypatch.setattr(ort, "available_providers", lambda: [ort.CUDA])
    if int8:
        bundle.manifest = msgspec.structs.replace(bundle.manifest, precision="int8")
    chosen = choose_sessions(bundle, preferences=Preferences(precision=None if int8 else "float32"))
    why = "its graphs are int8" if int8 else "float32 was asked for"
    assert chosen.on_cpu
    for words in chosen.choices.values():
        assert " on the CPU in " in words
        assert words.endswith(f": {why}, which is for CPUs")


def test_links_that_openvino_cannot_follow_are_onnxruntimes(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "find_gpu", lambda: made_up.NO_GPU)

    def refuse(weights: Path) -> Path:
        raise BackendError("its file cannot be linked to")

    monkeypatch.setattr(device, "linked_weights", refuse)
    assert set(choose_sessions(bundle).choices.values()) == {"ONNX Runtime on the CPU: there is no NVIDIA driver"}
    assert caplog.messages == ["OpenVINO is not used: its file cannot be linked to"]


def test_what_no_engine_covers_goes_to_onnxruntime_and_is_said_once(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, caplog: pytest.LogCaptureFixture
) -> None:
    build(cache, bundle)
    pipeline = Pipeline.load(bundle_path())
    with caplog.at_level(logging.WARNING, "latentrt"):
        for _ in range(2):
            pipeline("a red circle", seed=7, num_inference_steps=2, height=128, width=64)
    said = [record.message for record in caplog.records if "unet" in record.message]
    assert len(said) == 1
    assert all(part in said[0] for part in ("2×4×32×16", "2×4×8×8 … 2×4×16×16 … 2×4×16×16", "latentrt build"))


def test_engines_only_refuses_what_no_engine_covers(bundle: Bundle, cache: EngineCache, api: FakeCudaApi) -> None:
    build(cache, bundle)
    pipeline = Pipeline.load(bundle_path(), device="tensorrt")
    pipeline("a red circle", seed=7, num_inference_steps=1)
    with pytest.raises(EngineError, match="unet: no engine runs sample of shape 2×4×32×16"):
        pipeline("a red circle", seed=7, num_inference_steps=1, height=128, width=64)


def test_the_engine_for_the_fewest_shapes_runs_what_both_cover(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi
) -> None:
    build(cache, bundle, size="32..64")
    build(cache, bundle, "unet", size="64x64")
    narrow = made_up.identity(bundle, "unet")
    pipeline = Pipeline.load(bundle_path())
    assert pipeline.runs_on["unet"] == f"TensorRT-RTX engine {made_up.record(bundle, narrow).key[:12]} and 1 more"


def test_a_sealed_engine_is_taken_where_the_cache_is_empty(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(cache, bundle)
    sealed = seal(bundle, list(cache.engines()), cache, tmp_path / "sealed", overwrite=False)
    monkeypatch.setenv("LATENTRT_CACHE", str(tmp_path / "another"))
    pipeline = Pipeline.load(tmp_path / "sealed", device="tensorrt", digest=sealed.digest)
    assert pipeline("a red circle", seed=7, num_inference_steps=1).images
    # Its plan is checked like every file of a bundle.
    engine = next(iter(sealed.manifest.engines.values()))
    (tmp_path / "sealed" / engine.plan).write_bytes(b"another plan")
    with pytest.raises((IntegrityError, SafetyError), match="is not what its bundle"):
        Pipeline.load(tmp_path / "sealed", device="tensorrt")("a red circle", seed=7, num_inference_steps=1)


def test_no_engine_for_this_gpu_says_what_differs(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu(monkeypatch, made_up.H100)
    build(cache, bundle, "unet")
    choices = choose_sessions(bundle).choices
    assert choices["unet"] == (
        "OpenVINO on the CPU in float32: built for 8.9, this GPU is 9.0 (latentrt build), and this ONNX Runtime has no "
        "CUDA (pip install 'latentrt[gpu]')"
    )
    assert "no engine is built of vae_decoder (latentrt build)" in choices["vae_decoder"]
    with pytest.raises(
        EngineError, match=r"preview_decoder has no engine that runs on NVIDIA H100 80GB HBM3 .*: no engine"
    ):
        choose_sessions(bundle, "tensorrt")


def test_onnxruntime_on_the_gpu_comes_before_the_cpu_and_the_cpu_steps_in(
    bundle: Bundle,
    cache: EngineCache,
    api: FakeCudaApi,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """ONNX Runtime says what it was made with; whether CUDA's libraries are there shows when a graph is opened."""
    monkeypatch.setattr(ort, "available_providers", lambda: [ort.CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "check_provider", lambda provider: None)
    sessions = choose_sessions(bundle)
    assert sessions.choices["unet"] == "ONNX Runtime on the GPU; no engine is built of unet (latentrt build)"
    with caplog.at_level(logging.WARNING, "latentrt"):
        assert sessions("vae_decoder").inputs == bundle.manifest.components["vae_decoder"].inputs
    assert "vae_decoder runs on the CPU: found the provider 'CUDAExecutionProvider'" in caplog.text
    with pytest.raises(BackendError, match="found the provider"):
        choose_sessions(bundle, "cuda")("vae_decoder")


def test_an_engine_that_the_library_does_not_load_is_passed_over_and_tried_once(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, caplog: pytest.LogCaptureFixture
) -> None:
    identity = made_up.identity(bundle, "vae_decoder")
    made_up.publish(cache, bundle, identity, b"a plan that it does not load")
    with caplog.at_level(logging.WARNING, "latentrt"):
        pipeline = Pipeline.load(bundle_path())
        for _ in range(2):
            assert pipeline("a red circle", seed=7, num_inference_steps=1).images
    assert caplog.text.count("does not load the engine") == 1


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
    pipeline = Pipeline.load(bundle_path())
    expected = np.asarray(pipeline("a red circle", seed=7, num_inference_steps=2, output_type="np").images)
    pipeline = Pipeline.load(bundle_path())
    loaded.clear()
    with ThreadPoolExecutor(4) as pool:
        draw = lambda _: pipeline("a red circle", seed=7, num_inference_steps=2, output_type="np").images  # noqa: E731
        pictures = list(pool.map(draw, range(4)))
    assert sorted(loaded) == ["safety_checker", "text_encoder", "unet", "vae_decoder"]
    for picture in pictures:
        np.testing.assert_array_equal(np.asarray(picture), expected)


def test_a_damaged_engine_does_not_run_and_another_backend_does(
    bundle: Bundle, cache: EngineCache, api: FakeCudaApi, caplog: pytest.LogCaptureFixture
) -> None:
    build(cache, bundle)
    damaged = next(engine for engine in cache.engines() if engine.record.identity.component == "vae_decoder")
    damaged.plan_path.write_bytes(damaged.plan_path.read_bytes()[:-1] + b" ")
    pipeline = Pipeline.load(bundle_path())
    with caplog.at_level(logging.WARNING, "latentrt"):
        assert pipeline("a red circle", seed=7, num_inference_steps=1).images
    assert "it was moved to" in caplog.text
    assert cache.get(damaged.key) is None


def test_a_device_that_is_named_is_taken_or_refused(
    bundle: Bundle, cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "find_gpu", lambda: made_up.NO_GPU)
    assert choose_sessions(bundle, "cpu").choices["unet"] == "ONNX Runtime on the CPU: as asked"
    assert choose_sessions(bundle, "openvino").choices["unet"] == "OpenVINO on the CPU in float32: as asked"
    with pytest.raises(BackendError, match="engines run on a GPU, and here there is no NVIDIA driver; buy one"):
        choose_sessions(bundle, "tensorrt")
    with pytest.raises(BackendError, match=r"found the provider 'CUDAExecutionProvider'.*latentrt\[gpu\]"):
        choose_sessions(bundle, "cuda")
    with pytest.raises(RequestError, match="found the device 'tpu', expected one of auto, cpu, openvino, cuda"):
        choose_sessions(bundle, "tpu")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="expected one of the two"):
        choose_sessions(bundle, "cpu", provider="cpu")
    with monkeypatch.context() as without:
        without.setattr(ov, "computes_in_bfloat16", lambda: False)
        with pytest.raises(BackendError, match=r"no bfloat16 arithmetic on this CPU; --precision float32"):
            choose_sessions(bundle, "openvino", preferences=Preferences(precision="bfloat16"))
        without.setattr(ov, "is_installed", lambda: False)
        with pytest.raises(BackendError, match=r"openvino is needed to run .* pip install 'latentrt\[openvino\]'"):
            choose_sessions(bundle, "openvino")
    with pytest.raises(BackendError, match="found the component 'nope'"):
        choose_sessions(bundle)("nope")


def test_a_provider_by_name(bundle: Bundle) -> None:
    sessions = choose_sessions(bundle, provider="cpu", preferences=Preferences(threads=1))
    assert sessions.choices["unet"] == "ONNX Runtime with cpu"
    assert sessions("vae_decoder").inputs == bundle.manifest.components["vae_decoder"].inputs
    with pytest.raises(
        BackendError, match=r"found the provider 'npu', this ONNX Runtime .* has .*CPUExecutionProvider"
    ):
        choose_sessions(bundle, provider="npu")

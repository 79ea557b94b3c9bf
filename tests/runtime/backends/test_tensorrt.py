"""Engine sessions over stand-ins for CUDA and TensorRT: copies, shared memory, recorded runs, errors.

The libraries need a GPU to run a plan. Another test compares the names of the stand-ins with those of the real
libraries, which `make test-gpu` runs.
"""

from __future__ import annotations

import gc
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.backends.cuda.api import DeviceBuffer
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.tensorrt.device import EngineDevice
from latentrt.backends.tensorrt.runtime_cache import RuntimeCache
from latentrt.backends.tensorrt.session import EngineSession
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.digests import hash_bytes
from latentrt.bundle.user_cache import write_own
from latentrt.engines.record import EngineRecord
from latentrt.errors import BackendError, EngineError
from latentrt_engines.profiles import component_profile, image_profile
from tests.engines import made_up
from tests.runtime.backends import fake_cuda, fake_tensorrt
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.fake_tensorrt import fake_library, fake_plan

Feeds = dict[str, NDArray[Any]]


@pytest.fixture
def api() -> FakeCudaApi:
    return FakeCudaApi()


@pytest.fixture
def device(api: FakeCudaApi) -> EngineDevice:
    return EngineDevice(fake_library(api), api.cuda)


def record(bundle: Bundle, component: str = "vae_decoder", size: str = "32..128") -> EngineRecord:
    manifest = bundle.manifest
    images = image_profile(manifest, size=size, batch="1..4")
    profile = component_profile(component, manifest.components[component], images, manifest)
    return made_up.record(bundle, made_up.identity(bundle, component, profile=profile))


def session(device: EngineDevice, bundle: Bundle, component: str = "vae_decoder") -> EngineSession:
    engine = record(bundle, component)
    return EngineSession(device, fake_plan(bundle, engine), engine)


def latents(height: int = 8, seed: int = 0) -> Feeds:
    return {"latents": np.random.default_rng(seed).standard_normal((1, 4, height, 12), np.float32)}


def test_an_engine_computes_the_same_as_its_graph(device: EngineDevice, bundle: Bundle) -> None:
    engine, graph = session(device, bundle), open_session(bundle, "vae_decoder", threads=1)
    # An executed run, a recorded one, launched ones; another size, and back.
    for seed, height in enumerate((8, 8, 8, 8, 16, 16, 16, 8, 8)):
        feeds = latents(height, seed)
        np.testing.assert_array_equal(engine.run(feeds)["pixels"], graph.run(feeds)["pixels"])


def test_results_are_the_callers_own(device: EngineDevice, bundle: Bundle) -> None:
    engine = session(device, bundle)
    first = engine.run(latents(seed=1))["pixels"]
    kept = first.copy()
    engine.run(latents(seed=2))
    np.testing.assert_array_equal(first, kept)


def test_the_second_run_of_a_shape_is_recorded_and_later_ones_are_launched(
    device: EngineDevice, bundle: Bundle, api: FakeCudaApi
) -> None:
    engine = session(device, bundle)
    seen = []
    for height in (16, 16, 16, 8, 8, 16):
        engine.run(latents(height))
        seen.append((api.counts["captures"], api.counts["launches"]))
    # A shape that returns launches its recording.
    assert seen == [(0, 0), (1, 1), (1, 2), (1, 2), (2, 3), (2, 4)]


def test_an_engine_that_cannot_be_recorded_runs_without(
    device: EngineDevice, bundle: Bundle, api: FakeCudaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def invalid(stream: int) -> tuple[Any, ...]:
        api.capturing = None
        return (fake_cuda.FakeResult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None)

    monkeypatch.setattr(api.driver, "cuStreamEndCapture", invalid)
    engine, graph = session(device, bundle), open_session(bundle, "vae_decoder", threads=1)
    for seed in range(4):
        feeds = latents(seed=seed)
        np.testing.assert_array_equal(engine.run(feeds)["pixels"], graph.run(feeds)["pixels"])
    assert api.counts["launches"] == 0


def test_memory_is_allocated_once_for_a_shape_and_kept(device: EngineDevice, bundle: Bundle, api: FakeCudaApi) -> None:
    engine = session(device, bundle)
    for height in (16, 8):
        engine.run(latents(height))
    allocated = api.counts["allocations"]
    for height in (16, 8, 16, 8):
        engine.run(latents(height))
    assert api.counts["allocations"] == allocated


def test_activations_of_all_engines_share_one_memory(device: EngineDevice, bundle: Bundle, api: FakeCudaApi) -> None:
    """An engine uses the new memory after another one, which needs more, has replaced it."""
    decoder, encoder = session(device, bundle), session(device, bundle, "vae_encoder")
    graph = open_session(bundle, "vae_decoder", threads=1)
    decoder.run(latents())
    decoder.run(latents())
    before = device.scratch.size
    encoder.run({"pixels": np.zeros((1, 3, 128, 128), np.float32)})
    assert device.scratch.size > before
    for seed in (1, 2, 3):
        feeds = latents(seed=seed)
        np.testing.assert_array_equal(decoder.run(feeds)["pixels"], graph.run(feeds)["pixels"])
    assert device.scratch.address in api.allocated


def test_an_array_that_cannot_have_changed_is_not_copied_again(
    device: EngineDevice, bundle: Bundle, api: FakeCudaApi
) -> None:
    engine = session(device, bundle)
    feeds = latents()
    counts = []
    for _ in range(2):
        engine.run(feeds)
        counts.append(api.counts["uploads"])
    feeds["latents"].setflags(write=False)
    for _ in range(3):
        engine.run(feeds)
        counts.append(api.counts["uploads"])
    # A writable array may have been written to, also before it became read-only.
    assert counts == [1, 2, 3, 3, 3]
    graph, expected = open_session(bundle, "vae_decoder", threads=1), engine.run(feeds)["pixels"]
    other = latents(seed=1)  # writable
    np.testing.assert_array_equal(engine.run(other)["pixels"], graph.run(other)["pixels"])
    np.testing.assert_array_equal(engine.run(feeds)["pixels"], expected)


def test_a_shape_outside_the_profile_is_refused_and_the_next_run_is_right(device: EngineDevice, bundle: Bundle) -> None:
    engine, graph = session(device, bundle), open_session(bundle, "vae_decoder", threads=1)
    engine.run(latents())
    with pytest.raises(BackendError, match=r"got latents of shape \(1, 4, 99, 12\), the engine was built for 1×4×8×8"):
        engine.run(latents(99))
    np.testing.assert_array_equal(engine.run(latents())["pixels"], graph.run(latents())["pixels"])


def test_shapes_are_prepared_or_rejected_before_a_run(device: EngineDevice, bundle: Bundle, api: FakeCudaApi) -> None:
    engine = session(device, bundle)
    engine.prepare({"latents": (1, 4, 8, 12)})
    allocated = api.counts["allocations"]
    assert allocated > 0
    engine.prepare({"latents": (1, 4, 8, 12)})
    assert api.counts["allocations"] == allocated
    for shape in ((1, 4, 33, 8), (2, 4, 8, 8)):
        with pytest.raises(EngineError, match="latents"):
            engine.prepare({"latents": shape})


def test_the_context_of_a_shape_stays_on_the_device(device: EngineDevice, bundle: Bundle) -> None:
    engine = session(device, bundle)
    context = engine.device_context({"latents": (1, 4, 8, 12)})
    assert context is engine.device_context({"latents": (1, 4, 8, 12)})
    assert context is not engine.device_context({"latents": (1, 4, 8, 8)})
    assert context is not None
    assert (context.shape("latents"), context.loops) == ((1, 4, 8, 12), device.loops)


def test_batch_sizes_are_those_of_the_profile(device: EngineDevice, bundle: Bundle) -> None:
    assert session(device, bundle).batch_sizes({"latents": (7, 4, 8, 12)}) == (1,)
    assert session(device, bundle).batch_sizes({"latents": (1, 4, 33, 12)}) == ()
    denoiser = session(device, bundle, "unet")
    shapes = {"sample": (1, 4, 8, 8), "timestep": (1,), "encoder_hidden_states": (1, 77, 128)}
    assert denoiser.batch_sizes(shapes) == (2, 3, 4, 5, 6, 7, 8)
    assert denoiser.batch_sizes({**shapes, "encoder_hidden_states": (2, 78, 128)}) == ()
    with pytest.raises(BackendError, match="inputs: got"):
        denoiser.batch_sizes({"sample": (1, 4, 8, 8)})


def test_a_plan_that_does_not_load_is_an_error_with_the_librarys_message(device: EngineDevice, bundle: Bundle) -> None:
    with pytest.raises(
        EngineError, match=r"TensorRT 11.1\+cu13 does not load the engine .*magicTagRead.*build --force"
    ):
        EngineSession(device, b"not a plan", record(bundle))


def test_a_gpu_out_of_memory_is_a_latentrt_error(bundle: Bundle) -> None:
    api = FakeCudaApi(limit=100)
    engine = session(EngineDevice(fake_library(api), api.cuda), bundle)
    with pytest.raises(BackendError, match=r"CUDA failed at .* bytes of the GPU's memory: CUDA_ERROR_OUT_OF_MEMORY"):
        engine.run(latents())


def test_a_library_that_would_run_host_code_is_refused(api: FakeCudaApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_tensorrt.FakeRuntime, "engine_host_code_allowed", True)
    with pytest.raises(EngineError, match="host code"):
        EngineDevice(fake_library(api), api.cuda)


def test_closing_gives_all_memory_back(device: EngineDevice, bundle: Bundle, api: FakeCudaApi) -> None:
    engine = session(device, bundle)
    for _ in range(3):
        engine.run(latents())
    engine.close()
    device.scratch.close()
    assert api.allocated == {}


def test_rtx_stores_its_runtime_cache_beside_the_engine(bundle: Bundle, api: FakeCudaApi, tmp_path: Path) -> None:
    device = EngineDevice(fake_library(api, "tensorrt_rtx"), api.cuda)
    engine = record(bundle)
    folder = tmp_path / engine.key
    EngineSession(device, fake_plan(bundle, engine), engine, RuntimeCache(folder)).run(latents())
    (kept,) = folder.glob("*.rtcache")
    assert kept.read_bytes() == b"kernels"
    again = EngineSession(device, fake_plan(bundle, engine), engine, RuntimeCache(folder))
    again.run(latents())
    assert list(folder.glob("*.rtcache")) == [kept]
    # The library records its runs itself.
    assert api.counts["captures"] == 0


def test_reading_a_runtime_cache_takes_no_more_memory_than_it_has(tmp_path: Path) -> None:
    path = tmp_path / f"{hash_bytes(b'kernels')}.rtcache"
    write_own(path, b"kernels")
    tracemalloc.start()
    try:
        assert RuntimeCache(tmp_path)._read() == b"kernels"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_runtime_cache_that_was_changed_is_not_handed_to_the_library(
    bundle: Bundle, api: FakeCudaApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, engine = EngineDevice(fake_library(api, "tensorrt_rtx"), api.cuda), record(bundle)
    EngineSession(device, fake_plan(bundle, engine), engine, RuntimeCache(tmp_path)).run(latents())
    (kept,) = tmp_path.glob("*.rtcache")
    kept.write_bytes(b"kernels of somebody else")
    handed = list[bytes]()

    def deserialize(self: object, data: bytes) -> bool:
        handed.append(data)
        return True

    monkeypatch.setattr(fake_tensorrt.FakeRuntimeCache, "deserialize", deserialize)
    EngineSession(device, fake_plan(bundle, engine), engine, RuntimeCache(tmp_path)).run(latents())
    assert handed == []
    assert [path.read_bytes() for path in tmp_path.glob("*.rtcache")] == [b"kernels"]


def test_memory_of_an_unreferenced_engine_is_freed(bundle: Bundle, api: FakeCudaApi) -> None:
    device = EngineDevice(fake_library(api), api.cuda)
    engine = session(device, bundle)
    for height in (8, 8, 8, 16):
        engine.run(latents(height))
    del engine, device
    gc.collect()
    assert api.allocated == {}


def test_the_number_of_shapes_with_memory_is_bounded(device: EngineDevice, bundle: Bundle, api: FakeCudaApi) -> None:
    engine, graph = session(device, bundle), open_session(bundle, "vae_decoder", threads=1)
    kept = []
    for height in (8, 9, 10, 11, 12, 13, 14, 8):
        np.testing.assert_array_equal(engine.run(latents(height))["pixels"], graph.run(latents(height))["pixels"])
        kept.append(len(api.allocated))
    assert max(kept) == 4 * 2 + 1  # input and output of four sets of shapes, and the shared memory


def test_a_run_that_fails_while_it_is_recorded_leaves_nothing_behind(
    device: EngineDevice, bundle: Bundle, api: FakeCudaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = session(device, bundle)
    engine.run(latents())
    execute = fake_tensorrt.FakeContext.execute_async_v3
    refused = lambda self, stream: api.capturing is None and execute(self, stream)  # noqa: E731
    monkeypatch.setattr(fake_tensorrt.FakeContext, "execute_async_v3", refused)
    graph = open_session(bundle, "vae_decoder", threads=1)
    np.testing.assert_array_equal(engine.run(latents())["pixels"], graph.run(latents())["pixels"])
    assert (api.capturing, api.counts["captures"], api.counts["launches"]) == (None, 1, 0)


def test_threads_share_an_engine(device: EngineDevice, bundle: Bundle) -> None:
    engine, graph = session(device, bundle), open_session(bundle, "vae_decoder", threads=1)
    feeds = [latents(8 + seed % 3, seed) for seed in range(12)]
    expected = [graph.run(one)["pixels"] for one in feeds]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: engine.run(one)["pixels"], feeds))
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_buffer_grows_and_never_shrinks(api: FakeCudaApi) -> None:
    buffer = DeviceBuffer(api.cuda, api.cuda.make_stream())
    assert [buffer.reserve(size) for size in (10, 5, 10, 11)] == [True, False, False, True]
    assert len(api.allocated) == 1


class PanicError(BaseException):
    """As a library may raise it, which is no Exception."""


def test_whatever_the_library_raises_during_a_run_is_a_backend_error(
    device: EngineDevice, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = session(device, bundle)

    def panic(shapes: object) -> None:
        raise PanicError("in the library")

    monkeypatch.setattr(opened, "context", panic)
    with pytest.raises(BackendError, match="failed: in the library"):
        opened.run({"latents": np.zeros((1, 4, 16, 16), np.float32)})

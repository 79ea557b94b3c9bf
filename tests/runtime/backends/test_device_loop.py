"""Latents that stay on the device: the kernels' own source, compiled for the host, beside numpy's recurrence.

Both round every product and every sum to float32 in the same order, so they agree to the bit.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from latentrt import Pipeline, Request
from latentrt.backends.cuda import device_loop
from latentrt.backends.cuda.api import Cuda
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.session import Session
from latentrt.backends.tensorrt import device as engine_device
from latentrt.backends.tensorrt.by_shape import ChosenByShape
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.engines.choice import EngineSource
from latentrt.errors import BackendError, RequestError
from latentrt.sampling.schedule import Latents
from latentrt_engines.profiles import component_profile, image_profile
from tests.engines import made_up
from tests.runtime.backends import fake_cuda
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.fake_tensorrt import fake_library, fake_plan

# One for each way in which a row may be filled: memory, earlier latents, noise, mixtures, second stages.
SAMPLERS = [
    "ddim",
    "pndm",
    "euler",
    "euler_a",
    "heun",
    "dpmpp_2m",
    "dpmpp_sde",
    "dpmpp_2s",
    "deis",
    "unipc",
    "sa_solver",
    "lms",
    "tcd",
]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(bundle_path())


@pytest.fixture
def api() -> FakeCudaApi:
    return FakeCudaApi()


def on_device(bundle: Bundle, api: FakeCudaApi, library: str = "tensorrt") -> Pipeline:
    """A pipeline whose denoiser is an engine, and whose other submodules are ONNX Runtime's."""
    from latentrt.backends.tensorrt.session import EngineSession

    pictures = image_profile(bundle.manifest, size="32..128", batch="1..4", guidance="both")
    profile = component_profile("unet", bundle.manifest.components["unet"], pictures, bundle.manifest)
    record = made_up.record(bundle, made_up.identity(bundle, "unet", profile=profile))
    device = engine_device.EngineDevice(
        fake_library(api, "tensorrt_rtx" if library == "tensorrt_rtx" else "tensorrt"), Cuda(api, api.driver)
    )

    class Source:
        def __init__(self) -> None:
            self.record = record

        def plan(self) -> bytes:
            return fake_plan(bundle, record)

    def load(source: EngineSource) -> EngineSession:
        return EngineSession(device, source.plan(), source.record)

    def open_component(name: str) -> Session:
        return ChosenByShape(name, [Source()], load, None) if name == "unet" else on_host(name)

    def on_host(name: str) -> Session:
        return open_session(bundle, name, threads=1)

    return Pipeline(bundle, open_component)


@pytest.fixture(scope="module")
def host(bundle: Bundle) -> Pipeline:
    return Pipeline(bundle, lambda name: open_session(bundle, name, threads=1))


def drawn(pipeline: Pipeline, request: Request, look: bool = False) -> list[Latents]:
    """The latents of every step that is looked at: all, or the last."""
    return [step.latents.copy() for step in pipeline.steps(request) if look or step.index == step.total - 1]


@pytest.mark.parametrize("look", [False, True], ids=["the last step", "every step"])
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_gives_the_latents_of_the_host(
    bundle: Bundle, host: Pipeline, api: FakeCudaApi, sampler: str, guidance_scale: float, look: bool
) -> None:
    """Rows with memory, with noise, with a latent before the last, with and without guidance."""
    eta = 0.7 if sampler == "ddim" else 0.0
    request = Request(
        prompt=["a red circle", "a blue square"],
        seed=3,
        num_inference_steps=6,
        sampler=sampler,
        eta=eta,
        guidance_scale=guidance_scale,
        width=48,
        height=32,
    )
    expected, found = drawn(host, request, look), drawn(on_device(bundle, api), request, look)
    assert len(expected) == len(found) > 0
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_nothing_is_copied_between_the_steps_and_a_step_is_one_launch(
    bundle: Bundle, api: FakeCudaApi, library: str
) -> None:
    pipeline = on_device(bundle, api, library)
    counts = []
    for seed in (1, 2):
        before = dict(api.counts)
        drawn(pipeline, Request.of(prompt="a red circle", seed=seed, num_inference_steps=8, sampler="dpmpp_2m"))
        counts.append({name: api.counts[name] - before[name] for name in before})
    # At first: the embeddings, the latents, the table, two counters; at last: the latents and a flag.
    assert [(each["uploads"], each["downloads"]) for each in counts] == [(5, 2), (5, 2)]
    if library == "tensorrt":
        # The first step is done, the second recorded, and the next picture launches what this one recorded.
        assert [(each["captures"], each["launches"]) for each in counts] == [(1, 7), (0, 8)]
        assert counts[1]["kernels"] == 0
    else:  # which records its engine's runs itself
        assert [(each["captures"], each["kernels"]) for each in counts] == [(0, 3 * 8), (0, 3 * 8)]
    assert counts[1]["allocations"] == 0


def test_what_a_consumer_changes_is_what_the_loop_goes_on_with(
    bundle: Bundle, host: Pipeline, api: FakeCudaApi
) -> None:
    request = Request.of(prompt="a red circle", seed=3, num_inference_steps=5, sampler="dpmpp_2m")

    def changed(pipeline: Pipeline) -> Latents:
        for step in pipeline.steps(request):
            if step.index == 1:
                step.latents = step.latents * np.float32(0.5)
            if step.index == 2:
                step.latents[:, 0] += 1
        return step.latents

    np.testing.assert_array_equal(changed(on_device(bundle, api)), changed(host))


def test_latents_are_read_before_the_loop_goes_on(bundle: Bundle, api: FakeCudaApi) -> None:
    steps = list(on_device(bundle, api).steps(Request.of(prompt="a red circle", seed=3, num_inference_steps=3)))
    assert np.isfinite(steps[-1].latents).all()
    with pytest.raises(RequestError, match="the latents after row 1 are gone, the loop has come to row 3; read them"):
        _ = steps[0].latents


def test_the_last_latents_stay_when_another_picture_is_drawn(bundle: Bundle, host: Pipeline, api: FakeCudaApi) -> None:
    """Also those of a loop that was left early."""
    pipeline = on_device(bundle, api)
    request = Request.of(prompt="a red circle", seed=3, num_inference_steps=4)
    for step in pipeline.steps(request):
        if step.index == 1:
            break
    expected = drawn(host, request, look=True)
    drawn(pipeline, Request.of(prompt="a blue square", seed=4, num_inference_steps=4))
    np.testing.assert_array_equal(step.latents, expected[1])


def test_two_loops_at_once_have_memory_of_their_own(bundle: Bundle, host: Pipeline, api: FakeCudaApi) -> None:
    pipeline = on_device(bundle, api)
    requests = [Request.of(prompt=text, seed=5, num_inference_steps=4) for text in ("a red circle", "a blue square")]
    loops = [pipeline.steps(request) for request in requests]
    for _ in range(4):
        last = [next(loop) for loop in loops]
    for step, request in zip(last, requests, strict=True):
        np.testing.assert_array_equal(step.latents, drawn(host, request)[0])


def test_what_is_not_a_number_is_told_with_its_timestep(bundle: Bundle, host: Pipeline, api: FakeCudaApi) -> None:
    huge = np.full((1, 4, 16, 16), 1e38, np.float32)  # whose squares, in the denoiser's norms, overflow
    request = Request.of(prompt="a red circle", latents=huge, num_inference_steps=4)
    with pytest.raises(BackendError, match="gave values that are not finite numbers; lower the guidance scale") as told:
        drawn(on_device(bundle, api), request)
    with pytest.raises(BackendError) as expected:
        drawn(host, request)
    assert str(told.value) == str(expected.value)


@pytest.mark.parametrize("change", ["rescaled guidance", "prompts of two lengths"])
def test_what_the_kernels_do_not_know_is_done_on_the_host(
    bundle: Bundle, host: Pipeline, api: FakeCudaApi, change: str
) -> None:
    prompt = ["a red circle", "a red circle " * 40] if change == "prompts of two lengths" else "a red circle"
    rescale = 0.7 if change == "rescaled guidance" else 0.0
    request = Request.of(prompt=prompt, seed=3, num_inference_steps=2, guidance_rescale=rescale)
    if change == "prompts of two lengths":
        with pytest.raises(Exception, match="unet: no engine runs sample"):
            drawn(on_device(bundle, api), request)
    else:
        np.testing.assert_array_equal(drawn(on_device(bundle, api), request)[0], drawn(host, request)[0])
    assert api.counts["kernels"] == 0


def test_a_driver_that_does_not_take_the_kernels_leaves_the_loop_to_the_host(
    bundle: Bundle, host: Pipeline, api: FakeCudaApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: object, ptx: bytes) -> tuple[object, None]:
        return (fake_cuda.FakeResult.CUDA_ERROR_UNSUPPORTED_PTX_VERSION, None)

    monkeypatch.setattr(fake_cuda.FakeDriver, "cuModuleLoadData", refused)
    request = Request.of(prompt="a red circle", seed=3, num_inference_steps=3)
    np.testing.assert_array_equal(drawn(on_device(bundle, api), request)[0], drawn(host, request)[0])
    assert api.counts["kernels"] == 0


def test_the_kernels_are_compiled_of_this_source() -> None:
    """`nvcc -ptx -arch=compute_75 --fmad=false`, `.version 6.4`, and this line in front."""
    source = Path(device_loop.__file__).with_name("row.cu").read_bytes()
    first, *rest = device_loop._ptx().decode().splitlines()
    assert first == f"// of row.cu, sha256 {hashlib.sha256(source).hexdigest()}"
    assert ".version 6.4" in rest
    assert not any("fma" in line for line in rest)


def test_the_stand_in_has_names_of_the_real_driver() -> None:
    from cuda.bindings import driver

    names = {name for name in vars(fake_cuda.FakeDriver) if not name.startswith("_")}
    assert names <= set(dir(driver))
    assert {member.name for member in fake_cuda.FakeResult} <= set(driver.CUresult.__members__)

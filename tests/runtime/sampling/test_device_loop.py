"""The sampling loop on a device, compared with the host's on the same sessions: latents agree to the bit.

CUDA and TensorRT are stand-ins: kernels are row.cu compiled for the host, engines are graphs of the sample bundle or
the denoiser of `fakes`, whose outputs do not depend on the batch.
"""

from __future__ import annotations

import gc
import itertools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from latentrt import Pipeline, Request
from latentrt.backends.models import Components, Models
from latentrt.backends.onnxruntime import open_session
from latentrt.backends.placement import Placement, Preferences, place_components
from latentrt.backends.session import Arrays, Session, Shapes
from latentrt.backends.tensorrt.device import EngineDevice
from latentrt.backends.tensorrt.engine_set import EngineSet
from latentrt.backends.tensorrt.session import EngineSession
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.sample import bundle_path
from latentrt.bundle.tensors import TensorSpec
from latentrt.engines.choice import EngineSource
from latentrt.engines.record import EngineRecord, LibraryName, ShapeRange
from latentrt.errors import BackendError, RequestError
from latentrt.sampling.denoiser import Conditioning, WholeDenoiser
from latentrt.sampling.device_loop import DeviceDenoiser
from latentrt.sampling.guidance import ClassifierFree, Unguided
from latentrt.sampling.loop import Sample, Step, prepare, step
from latentrt.sampling.samplers import Steps
from latentrt.sampling.schedule import Latents
from latentrt_engines.profiles import component_profile, image_profile
from tests.engines import made_up
from tests.runtime.backends import fake_cuda
from tests.runtime.backends.fake_cuda import FakeCudaApi
from tests.runtime.backends.fake_tensorrt import FUNCTIONS, fake_library, fake_plan, function_plan
from tests.runtime.fake_sessions import FunctionSession
from tests.runtime.sampling import fakes
from tests.runtime.sampling.test_loop import STRATEGIES, TRAINED, UNLIKE, Wanted, alone, generate

GUIDED = ClassifierFree(scale=5.0)
WITHOUT_GUIDANCE = {"guidance_scale": 1.0}
INTERVAL = {"guidance_start": 0.3, "guidance_end": 0.8}


class Source:
    """An engine that is nowhere stored."""

    def __init__(self, record: EngineRecord, plan: bytes) -> None:
        self.record, self._plan = record, plan

    def plan(self) -> bytes:
        return self._plan


class Machine:
    """A GPU with an engine of the sample bundle's denoiser; other components run on the CPU.

    Args:
        profile: options of `image_profile`.
        fallback: run shapes that the engine does not cover with ONNX Runtime, in place of an error.
    """

    def __init__(self, library: LibraryName = "tensorrt", *, fallback: bool = False, **profile: Any) -> None:
        self.bundle, self.api = Bundle.open(bundle_path()), FakeCudaApi()
        device = EngineDevice(fake_library(self.api, library), self.api.cuda)
        options = {"size": "32..64", "batch": "1..4", "guidance": "both", **profile}
        manifest = self.bundle.manifest
        shapes = component_profile("unet", manifest.components["unet"], image_profile(manifest, **options), manifest)
        record = made_up.record(self.bundle, made_up.identity(self.bundle, "unet", profile=shapes))
        source = Source(record, fake_plan(self.bundle, record))

        def load(source: EngineSource) -> EngineSession:
            return EngineSession(device, source.plan(), source.record)

        def open_fallback() -> Session:
            return open_session(self.bundle, "unet", threads=1)

        engine = Placement(
            backend=library,
            device="gpu",
            title="an engine",
            open=lambda _: EngineSet("unet", [source], load, open_fallback if fallback else None),
            key=("an engine",),
        )
        self._placements = {
            **place_components(self.bundle, "cpu", preferences=Preferences(threads=1)),
            "unet": engine,
        }
        self._models = Models()
        self.pipeline = self._open(self._placements)
        # The same sessions, by the same key, and the loop of a backend without device contexts.
        self.host = self._open({**self._placements, "unet": replace(engine, backend="onnxruntime")})

    def _open(self, placements: Mapping[str, Placement]) -> Pipeline:
        return Pipeline(self.bundle, Components(placements, models=self._models))

    def count(self, work: Callable[[], object]) -> dict[str, int]:
        """Return the calls of CUDA during `work`, by kind."""
        before = dict(self.api.counts)
        work()
        return {name: self.api.counts[name] - count for name, count in before.items()}


@pytest.fixture(scope="module")
def machine() -> Machine:
    """For tests that change nothing of it."""
    return Machine()


def request(**options: Any) -> Request:
    defaults = {"prompt": "a red circle", "seed": 3, "num_inference_steps": 4, "width": 48, "height": 32}
    return Request.of(**{**defaults, **options})


def last(pipeline: Pipeline, **options: Any) -> Latents:
    """Return the last latents; nobody reads the others."""
    return list(pipeline.steps(request(**options)))[-1].latents


def on_host(made: Step) -> list[bool]:
    """Return for each image whether its latents are on the host."""
    return [sample.on_host is not None for sample in made._samples]


def assert_as_on_the_host(machine: Machine, *, on_device: bool = True, **options: Any) -> None:
    expected, rows = last(machine.host, **options), 0
    for made in machine.pipeline.steps(request(**options)):
        rows += 1
        assert {*on_host(made)} == {not on_device or rows == made.total}
    np.testing.assert_array_equal(made.latents, expected)
    assert np.abs(expected).max() > 0.1
    assert rows > 1


# A pipeline.


@pytest.mark.parametrize("guidance", [{}, WITHOUT_GUIDANCE, INTERVAL], ids=["guided", "unguided", "interval"])
@pytest.mark.parametrize("sampler", ["euler", "euler_a", "dpmpp_2m", "heun", "unipc", "pndm"])
def test_latents_are_those_of_the_host(machine: Machine, sampler: str, guidance: dict[str, Any]) -> None:
    prompts = ["a red circle", "a blue square", "a green triangle"]
    assert_as_on_the_host(machine, prompt=prompts, sampler=sampler, num_inference_steps=5, **guidance)


@pytest.mark.parametrize("guidance", [{}, WITHOUT_GUIDANCE, INTERVAL], ids=["guided", "unguided", "interval"])
def test_batches_are_padded_to_the_engines_own(guidance: dict[str, Any]) -> None:
    """Two images, or four evaluations, on an engine for four images with guidance, or eight evaluations."""
    machine = Machine(batch="4", guidance="on")
    assert_as_on_the_host(machine, prompt=["a red circle", "a blue square"], sampler="euler_a", **guidance)


def test_more_images_than_an_engine_takes_run_in_several_batches(machine: Machine) -> None:
    assert_as_on_the_host(machine, num_images_per_prompt=5)


def test_prompts_of_two_lengths_are_both_on_the_device() -> None:
    machine = Machine(chunks="1..2")
    assert_as_on_the_host(machine, prompt=["a red circle", "a red circle " * 40, "a blue square"], sampler="dpmpp_2m")


@pytest.mark.parametrize("library", ["tensorrt", "tensorrt_rtx"])
def test_nothing_is_copied_between_the_steps_and_a_step_is_one_launch(library: LibraryName) -> None:
    machine, rows = Machine(library), 8
    counts = [
        machine.count(partial(last, machine.pipeline, seed=seed, num_inference_steps=rows, sampler="dpmpp_2m"))
        for seed in (1, 2)
    ]
    # At first the embeddings, the slot, and the list of slots, which is the same the second time; at last the latents.
    assert [(each["uploads"], each["downloads"]) for each in counts] == [(3, 1), (2, 1)]
    assert counts[1]["allocations"] == 0
    if library == "tensorrt":
        # The first step is executed, the second recorded; the next image launches what this one recorded.
        assert [(each["captures"], each["launches"]) for each in counts] == [(1, rows - 1), (0, rows)]
        assert counts[1]["kernels"] == 0
    else:  # which records its engine's runs itself
        assert [(each["captures"], each["kernels"]) for each in counts] == [(0, 3 * rows), (0, 3 * rows)]


def test_noise_is_the_only_thing_that_a_step_uploads(machine: Machine) -> None:
    last(machine.pipeline, sampler="euler_a", num_inference_steps=8)
    with_noise, without = (
        machine.count(partial(last, machine.pipeline, sampler=sampler, num_inference_steps=8))
        for sampler in ("euler_a", "euler")
    )
    assert with_noise["uploads"] - without["uploads"] == 7, "the last row adds none"
    assert with_noise["downloads"] == without["downloads"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_rescale": 0.7},
        {"sampler_options": {"thresholding": True, "sample_max_value": 1.5}, "sampler": "ddim"},
        {"sampler": "euler_a", "guidance_rescale": 0.3, "guidance_end": 0.5},
    ],
    ids=["rescaled guidance", "dynamic thresholding", "rescaled in an interval"],
)
def test_rows_that_the_device_does_not_compute_go_through_the_host(machine: Machine, options: dict[str, Any]) -> None:
    assert_as_on_the_host(machine, on_device=False, **options)


def test_inpainting_by_blending_goes_through_the_host(machine: Machine) -> None:
    rng = np.random.default_rng(0)
    image, mask = (Image.fromarray(rng.integers(0, 256, (32, 48, 3), np.uint8)) for _ in range(2))
    assert_as_on_the_host(machine, on_device=False, image=image, mask_image=mask)
    assert_as_on_the_host(machine, image=image, strength=0.6)


def test_shapes_that_no_engine_covers_go_through_the_host(caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(fallback=True)
    with caplog.at_level(logging.WARNING, "latentrt"):
        assert_as_on_the_host(machine, on_device=False, width=128)
    assert ["2×4×8×32" in record.message for record in caplog.records] == [True]
    assert_as_on_the_host(machine)


def test_a_driver_that_does_not_load_the_kernels_leaves_the_loop_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: object) -> None:
        raise fake_cuda.FakeCudaError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION: the PTX is newer than the driver")

    monkeypatch.setattr(fake_cuda.FakeKernel, "compile", refuse)
    assert_as_on_the_host(Machine(), on_device=False)


def test_a_device_without_memory_for_the_latents_leaves_the_loop_to_the_host() -> None:
    machine = Machine()
    last(machine.host)  # which allocates inputs, outputs and activations
    full = sum(map(len, machine.api.allocated.values()))
    for left in (0, 500):  # for nothing; for the list of slots, but for no slot
        machine.api.limit = full + left
        assert_as_on_the_host(machine, on_device=False)
    machine.api.limit = 1 << 30
    assert_as_on_the_host(machine)


# Steps.


def test_latents_are_downloaded_where_somebody_reads_them(machine: Machine) -> None:
    expected = [each.latents for each in machine.host.steps(request())]

    def read(*indices: int) -> dict[str, int]:
        def run() -> None:
            for each in machine.pipeline.steps(request()):
                if each.index in indices:
                    for _ in range(2):
                        np.testing.assert_array_equal(each.latents, expected[each.index])

        return machine.count(run)

    assert [read(*indices)["downloads"] for indices in ((), (3,), (1,), (0, 1, 2, 3))] == [1, 1, 2, 4]


def test_latents_are_read_before_the_loop_goes_on(machine: Machine) -> None:
    steps = []
    for each in machine.pipeline.steps(request()):
        steps.append(each)
        if each.index == 1:
            kept = each.latents.copy()
    with pytest.raises(RequestError, match=r"row 1 .* row 4"):
        _ = steps[0].latents
    np.testing.assert_array_equal(steps[1].latents, kept)
    np.testing.assert_array_equal(steps[3].latents, last(machine.host))


def test_the_loop_goes_on_with_latents_that_were_replaced(machine: Machine) -> None:
    def changed(pipeline: Pipeline) -> Latents:
        for each in pipeline.steps(request(sampler="dpmpp_2m", num_images_per_prompt=2)):
            if each.index == 0:
                each.latents = each.latents * np.float32(0.5)
            if each.index == 1:
                each.latents = np.full((2, 4, 8, 12), 0.25, np.float64)  # without reading them before
            if each.index == 2:
                each.latents[:, 0] += 1
        each.latents = each.latents * 2  # after the end
        return each.latents

    np.testing.assert_array_equal(changed(machine.pipeline), changed(machine.host))
    assert not np.array_equal(changed(machine.host), last(machine.host, sampler="dpmpp_2m", num_images_per_prompt=2))


@pytest.mark.parametrize("index", [0, 1, 3])
def test_the_last_latents_stay_when_another_image_is_generated(machine: Machine, index: int) -> None:
    """Also of a loop that was left early."""
    expected = [each.latents for each in machine.host.steps(request())]
    steps = machine.pipeline.steps(request())
    made = next(itertools.islice(steps, index, None))
    steps.close()
    last(machine.pipeline, prompt="a blue square", seed=4)
    np.testing.assert_array_equal(made.latents, expected[index])


def test_two_loops_at_once_have_memory_of_their_own(machine: Machine) -> None:
    prompts = ["a red circle", "a blue square"]
    loops = [machine.pipeline.steps(request(prompt=prompt)) for prompt in prompts]
    made = [next(loop) for _ in range(4) for loop in loops][-2:]
    for each, prompt in zip(made, prompts, strict=True):
        np.testing.assert_array_equal(each.latents, last(machine.host, prompt=prompt))


@pytest.mark.parametrize("reads", [0, 1, 3])
def test_latents_that_are_not_finite_are_an_error_that_names_the_timestep(machine: Machine, reads: int) -> None:
    latents = np.random.default_rng(0).standard_normal((2, 4, 8, 12), np.float32)
    latents[1] = 1e38  # whose squares overflow in the denoiser's norms
    options: dict[str, Any] = {"prompt": ["a red circle", "a blue square"], "latents": latents}
    with pytest.raises(BackendError) as expected:
        last(machine.host, **options)

    def read() -> None:
        for each in machine.pipeline.steps(request(**options)):
            if each.index == reads:
                _ = each.latents

    with pytest.raises(BackendError) as found:
        read()
    assert str(found.value) == str(expected.value)
    assert "timestep 751 " in str(found.value)
    made = list(machine.pipeline.steps(request(**options)))[-1]
    with pytest.raises(BackendError, match="timestep 751 "):  # also when the loop is over
        _ = made.latents
    assert_as_on_the_host(machine)


# Samples that join and leave, on a made-up engine.


def compute(feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    BATCHES.append(len(feeds["x"]))
    with np.errstate(over="ignore", invalid="ignore"):
        rows = zip(feeds["x"], feeds["t"], feeds["text"], strict=True)
        return {"y": np.stack([fakes.whole(x.copy(), t, text.copy()) for x, t, text in rows])}


def compute_sized(feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    factors = 1 + feeds["sizes"].sum(axis=1) / np.float32(100)
    return {"y": compute(feeds)["y"] * factors[:, None, None, None]}


SIZES = TensorSpec("sizes", "float32", ("evaluations", 3))  # such as micro-conditioning
FUNCTIONS["the denoiser of fakes"] = compute
FUNCTIONS["the denoiser of fakes and sizes"] = compute_sized
BATCHES: list[int] = []  # of the runs of engines


@pytest.fixture(autouse=True)
def _no_batches() -> None:
    BATCHES.clear()


def made_up_engine(api: FakeCudaApi, *, smallest: int = 1, largest: int = 8, sized: bool = False) -> EngineSession:
    """Return an engine of `fakes.whole` for batches of a range, possibly with an input of sizes."""
    low = {"x": (smallest, 4, 3, 3), "t": (smallest,), "text": (smallest, 3, fakes.WIDTH)}
    high = {"x": (largest, 9, 5, 5), "t": (largest,), "text": (largest, 9, fakes.WIDTH)}
    if sized:
        low["sizes"], high["sizes"] = (smallest, 3), (largest, 3)
    profile = {name: ShapeRange(min=low[name], opt=low[name], max=high[name]) for name in low}
    bundle = Bundle.open(bundle_path())
    record = msgspec.structs.replace(
        made_up.record(bundle, made_up.identity(bundle, "unet", profile=profile)),
        inputs=(*fakes.INPUTS, *((SIZES,) if sized else ())),
        outputs=(TensorSpec("y", "float32", ("evaluations", 4, "height", "width")),),
    )
    device = EngineDevice(fake_library(api, "tensorrt"), api.cuda)
    name = "the denoiser of fakes and sizes" if sized else "the denoiser of fakes"
    return EngineSession(device, function_plan(name, record), record)


def open_device(session: Session) -> DeviceDenoiser:
    return DeviceDenoiser(session, **fakes.NAMES)


def open_host() -> WholeDenoiser:
    return fakes.open_whole(fakes.FakeSession())


@pytest.fixture
def api() -> FakeCudaApi:
    return FakeCudaApi()


@pytest.fixture
def denoiser(api: FakeCudaApi) -> DeviceDenoiser:
    return open_device(made_up_engine(api))


def assert_as_if_alone(wanted: Sequence[Wanted], denoiser: DeviceDenoiser) -> None:
    for each, found in zip(wanted, generate(wanted, denoiser), strict=True):
        np.testing.assert_array_equal(found, alone(each, open_host()), err_msg=str(each))


def stays_on_device(wanted: Wanted, denoiser: DeviceDenoiser) -> bool:
    sample = wanted.make()
    step([sample], denoiser)
    return sample.on_host is None


def test_different_samples_in_a_batch_equal_single_runs_and_the_host(denoiser: DeviceDenoiser) -> None:
    assert_as_if_alone(UNLIKE, denoiser)
    # 3 and 13 rescale, 5, 6 and 13 blend, 6 has dynamic thresholding, 9 is guided by an image.
    on_host = [each.seed for each in UNLIKE if not stays_on_device(each, denoiser)]
    assert on_host == [3, 5, 6, 9, 13]
    denoiser.close()


def test_every_evaluation_has_its_own_vectors(api: FakeCudaApi) -> None:
    """As pooled texts and micro-conditioning are."""

    def make(each: Wanted) -> Sample:
        def condition(seed: int, tokens: int = 3, concat: NDArray[np.float32] | None = None) -> Conditioning:
            sizes = np.array([seed % 7, seed % 5, tokens], np.float32)
            return Conditioning({**fakes.conditioning(seed, tokens).inputs, "sizes": sizes}, concat)

        return each.make(condition)

    wanted = [Wanted(seed=1), Wanted(seed=2, guidance=GUIDED), Wanted(seed=3, sampler="ddim")]
    outputs = (TensorSpec("y", "float32", ("evaluations", 4, "height", "width")),)
    session = FunctionSession((*fakes.INPUTS, SIZES), outputs, lambda feeds: compute_sized({**feeds}))
    expected = []
    for each in wanted:
        sample, host = make(each), WholeDenoiser(session, **fakes.NAMES)
        while not sample.done:
            step([sample], host)
        expected.append(sample.latents)
    samples, denoiser = [make(each) for each in wanted], open_device(made_up_engine(api, sized=True))
    step(samples, denoiser)
    assert all(sample.on_host is None for sample in samples)
    while active := [sample for sample in samples if not sample.done]:
        step(active, denoiser)
    for sample, latents in zip(samples, expected, strict=True):
        np.testing.assert_array_equal(sample.latents, latents)
    denoiser.close()


@settings(deadline=None, max_examples=15)
@given(
    wanted=st.lists(
        st.builds(
            Wanted,
            seed=st.integers(0, 10**6),
            sampler=st.sampled_from(TRAINED),
            steps=st.builds(Steps, count=st.integers(5, 9), begin=st.integers(0, 4)),
            guidance=st.sampled_from(STRATEGIES),
            tokens=st.sampled_from([3, 6]),
            inpaint=st.sampled_from([False, False, True]),
            concat=st.sampled_from([0, 0, 5]),
            join=st.integers(0, 12),
            leave=st.one_of(st.none(), st.integers(1, 5)),
        ),
        min_size=1,
        max_size=6,
    ),
    smallest=st.integers(1, 3),
)
def test_any_mixture_equals_single_runs(wanted: list[Wanted], smallest: int) -> None:
    assert_as_if_alone(wanted, open_device(made_up_engine(FakeCudaApi(), smallest=smallest, largest=5)))


def test_a_sample_that_is_done_or_abandoned_leaves_its_memory_to_others(
    api: FakeCudaApi, denoiser: DeviceDenoiser
) -> None:
    allocations = []
    for seed in range(6):
        sample = Wanted(seed=seed, steps=Steps(count=3)).make()
        for _ in range(3 if seed % 2 else 2):
            step([sample], denoiser)
        assert sample.done == (sample.on_host is not None) == bool(seed % 2)
        del sample
        gc.collect()
        allocations.append(api.counts["allocations"])
    assert len({*allocations}) == 1
    waits, other = Wanted(seed=7).make(), Wanted(seed=8).make()
    step([waits], denoiser)
    for _ in range(3):  # it is not abandoned, it only waits
        step([other], denoiser)
    np.testing.assert_array_equal(waits.latents, alone(Wanted(seed=7, leave=1), open_host()))


def test_closing_gives_samples_under_way_back(denoiser: DeviceDenoiser) -> None:
    wanted = [Wanted(seed=1), Wanted(seed=2, sampler="heun", leave=3), Wanted(seed=3, inpaint=True, leave=3)]
    samples = [each.make() for each in wanted]
    for _ in range(3):
        step(samples, denoiser)
    assert [sample.on_host is None for sample in samples] == [True, True, False]
    for _ in range(2):
        denoiser.close()
        assert all(sample.on_host is not None for sample in samples)
    for each, sample in zip(wanted, samples, strict=True):
        np.testing.assert_array_equal(sample.latents, alone(replace(each, leave=3), open_host()))


def test_a_sample_that_is_not_finite_disturbs_no_other(denoiser: DeviceDenoiser) -> None:
    wanted = Wanted(seed=1, sampler="dpmpp_2m")
    healthy, broken = wanted.make(), Wanted(seed=2, sampler="ddim", guidance=ClassifierFree(scale=3e38)).make()
    while not healthy.done:
        step([broken, healthy], denoiser)
    np.testing.assert_array_equal(healthy.latents, alone(wanted, open_host()))
    for _ in range(2):
        with pytest.raises(BackendError, match=f"timestep {broken.schedule.t[0]:g} "):
            _ = broken.latents
    assert broken.done


@pytest.mark.parametrize(("sampler", "on_device"), [("euler", True), ("dpmpp_2m", False)])
def test_a_sample_whose_history_is_on_the_host_goes_on_there(
    denoiser: DeviceDenoiser, sampler: str, on_device: bool
) -> None:
    wanted = Wanted(seed=1, sampler=sampler)
    sample, before = wanted.make(), open_host()
    for _ in range(2):
        step([sample], before)
    step([sample], denoiser)
    assert (sample.on_host is None) == on_device
    while not sample.done:
        step([sample], denoiser)
    np.testing.assert_array_equal(sample.latents, alone(wanted, open_host()))


def test_a_sample_with_evaluations_of_two_shapes_goes_through_the_host(denoiser: DeviceDenoiser) -> None:
    def run(denoiser: WholeDenoiser) -> Sample:
        wanted = Wanted(seed=1, sampler="ddim").make()
        texts = {"negative": fakes.conditioning(1, tokens=3), "positive": fakes.conditioning(2, tokens=6)}
        sample = Sample(wanted.schedule, wanted.latents, texts, GUIDED)
        for _ in range(2):
            step([sample], denoiser)
        return sample

    found = run(denoiser)
    assert found.on_host is not None
    np.testing.assert_array_equal(found.latents, run(open_host()).latents)


def test_an_engine_too_small_for_a_guided_row_leaves_the_sample_to_the_host(api: FakeCudaApi) -> None:
    denoiser = open_device(made_up_engine(api, largest=1))
    wanted = [Wanted(seed=1, guidance=ClassifierFree(scale=5.0, start=0.4)), Wanted(seed=2, guidance=Unguided())]
    assert [stays_on_device(each, denoiser) for each in wanted] == [False, True]
    assert_as_if_alone(wanted, denoiser)


# Batch sizes.


def step_many(denoiser: DeviceDenoiser, counts: Sequence[int], guidance: Any = GUIDED) -> list[int]:
    """Step growing and shrinking batches of samples; return the sizes of the runs."""
    samples = [Wanted(seed=seed, steps=Steps(count=20), guidance=guidance).make() for seed in range(max(counts))]
    BATCHES.clear()
    for count in counts:
        step(samples[:count], denoiser)
    samples[0].latents.sum()  # what is on the stream is executed
    return BATCHES


def test_a_batch_that_grows_is_padded_to_few_sizes(api: FakeCudaApi) -> None:
    denoiser = open_device(made_up_engine(api, largest=13))
    assert step_many(denoiser, [1, 2, 3, 4, 5, 6, 7]) == [2, 4, 8, 8, 13, 13, 13, 2]
    step_many(denoiser, [5, 4, 3, 2, 1])
    allocations = api.counts["allocations"]
    step_many(denoiser, [5, 4, 3, 2, 1] * 3)
    assert api.counts["allocations"] == allocations, "no context was made anew"


def test_a_batch_of_a_size_that_was_prepared_is_not_padded(api: FakeCudaApi) -> None:
    denoiser = open_device(made_up_engine(api, largest=13))
    prepare([Wanted(seed=seed).make() for seed in range(3)], denoiser)
    assert step_many(denoiser, [3, 2, 4]) == [6, 4, 8]


def test_samples_are_not_split_between_batches(api: FakeCudaApi) -> None:
    denoiser = open_device(made_up_engine(api, largest=5))
    assert step_many(denoiser, [3]) == [4, 2]
    assert step_many(denoiser, [7], Unguided()) == [5, 2]


class Limited(Session):
    """A session with device contexts for batches of up to `largest`."""

    def __init__(self, session: EngineSession, largest: int) -> None:
        self.session, self.largest = session, largest
        self.inputs, self.outputs = session.inputs, session.outputs

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return self.session.run(feeds)

    def batch_sizes(self, shapes: Shapes) -> tuple[int, ...] | None:
        return self.session.batch_sizes(shapes)

    def device_context(self, shapes: Shapes) -> Any | None:
        return self.session.device_context(shapes) if shapes["t"][0] <= self.largest else None


def test_sizes_that_the_device_has_no_memory_for_are_not_used(api: FakeCudaApi) -> None:
    denoiser = open_device(Limited(made_up_engine(api), 4))
    assert step_many(denoiser, [1, 4, 3]) == [2, 4, 4, 4, 2]
    assert_as_if_alone([Wanted(seed=seed, join=seed) for seed in range(5)], denoiser)


def test_a_sample_on_a_device_that_runs_no_further_step_is_an_error(api: FakeCudaApi) -> None:
    session = Limited(made_up_engine(api), 8)
    denoiser, wanted = open_device(session), Wanted(seed=1)
    sample, other = wanted.make(), Wanted(seed=2, inpaint=True).make()
    step([sample, other], denoiser)
    session.largest = 0
    with pytest.raises(BackendError, match="memory"):
        step([sample, other], denoiser)
    denoiser.close()
    np.testing.assert_array_equal(sample.latents, alone(replace(wanted, leave=1), open_host()))


def test_a_sample_that_no_memory_is_left_for_goes_through_the_host_beside_others(
    api: FakeCudaApi, denoiser: DeviceDenoiser
) -> None:
    wanted = [Wanted(seed=seed, sampler="dpmpp_2m") for seed in range(3)]
    samples = [each.make() for each in wanted]
    for count in (1, 2):
        prepare(samples[:count], denoiser)
    for sample in samples[:2]:
        step([sample], denoiser)
    BATCHES.clear()
    api.limit = 0  # for the slot of the third sample, and for the list of slots of a batch of four
    step(samples, denoiser)
    assert [sample.on_host is None for sample in samples] == [True, True, False]
    while not samples[-1].done:
        step([sample for sample in samples if not sample.done], denoiser)
    assert {*BATCHES} == {2}
    for each, sample in zip(wanted, samples, strict=True):
        np.testing.assert_array_equal(sample.latents, alone(each, open_host()))


def test_engines_of_two_libraries_do_not_share_a_loop(api: FakeCudaApi) -> None:
    """Each library has a stream and a lock of its own."""
    other_api = FakeCudaApi()
    small, large = made_up_engine(api, largest=2), made_up_engine(other_api, smallest=3, largest=8)

    class Both(Limited):
        def batch_sizes(self, shapes: Shapes) -> tuple[int, ...] | None:
            return (*small.batch_sizes(shapes), *large.batch_sizes(shapes))

        def device_context(self, shapes: Shapes) -> Any | None:
            return (small if shapes["t"][0] <= 2 else large).device_context(shapes)

    denoiser = open_device(Both(small, 8))
    wanted = [Wanted(seed=seed, join=seed) for seed in range(3)]
    assert_as_if_alone(wanted, denoiser)
    assert api.counts["kernels"] > 0
    assert other_api.counts["kernels"] == 0


def test_conditioning_that_a_device_keeps_cannot_be_written_to() -> None:
    concat = np.zeros((5, 3, 5), np.float32)
    fakes.conditioning(1, concat=concat)
    with pytest.raises(ValueError, match=re.escape("read-only")):
        concat[0] = 1


def test_a_sample_that_left_takes_other_latents(denoiser: DeviceDenoiser) -> None:
    sample: Sample = Wanted(seed=1, steps=Steps(count=2)).make()
    while not sample.done:
        step([sample], denoiser)
    sample.latents = np.ones(sample.shape, np.float32)
    denoiser.close()
    np.testing.assert_array_equal(sample.latents, 1)
